"""Look at what came of a run.

  python -m pipeline status runs/demo
  python -m pipeline evaluate --run runs/demo
  python -m pipeline trace --run runs/demo --image tiles.png --question "what comes next?"
  python -m pipeline cache-info runs/demo
  python -m pipeline env

status says which steps are done and what to run next; evaluate compares models on held-out data; trace shows what each
layer of a model says; cache-info what a teacher cache holds, and how true it is; env what a bug report needs.
`python -m pipeline COMMAND --help` is the manual of one. Runs are made by launch/train.py, data by python -m data_prep.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

STATUS = """Which steps of a run are begun or done, their last losses, what lies on disk, and the command to run next.

  python -m pipeline status runs/demo
"""

EVALUATE = """Greedy answers and perplexity on held-out data, for one model or several in one table.

  python -m pipeline evaluate --run runs/demo
  python -m pipeline evaluate --run runs/demo --model finetuned=runs/plain/student
  python -m pipeline evaluate --model Qwen2-VL-2B --data shards/held_out --limit 500 --output evaluation.json
  python -m pipeline evaluate --model teacher=models/72b --model student=models/2b --data shards/held_out

With --run: the run's teacher, its untouched student and its distilled student, on the recipe's data.held_out.

Each chat's last question is put, with all that was said before it, and answered greedily. The answer is right if it
equals the data's after normalisation of both: Unicode NFKC, lower case, white space collapsed and stripped, and any of
. , ; : ! ? stripped at the end. Articles stay. The result is given in total and, where the data has question types, for
each type. Perplexity is exp of the mean cross-entropy (nat) over all response tokens, end of turn included, as the
models are trained on them.

Beside the models stands `question_only`: the commonest answer to the same question in training data, without a picture;
to a question not found there, the commonest answer of all. What a model gets beyond it, it gets from the picture.

Samples that a model cannot take are counted and named: read = used + rejected. More of them than --max-bad-share stop
the evaluation: a result on what is left would not be a result on this data. Models run in float32 on a CPU, and on a
GPU in the number format that their config.json names, else in bfloat16.
"""

TRACE = """What each target layer of a run's models says about one question, side by side (paper, Figure 3).

  python -m pipeline trace --run runs/demo --image tiles.png --question "what comes next?"
  python -m pipeline trace --run runs/demo --sample 000017
  python -m pipeline trace --run runs/demo --sample 000017 --data shards/train

Shown for the teacher, the untouched student and the distilled student; the distilled one speaks through the untouched
one's verbalizers, which are not trained again. Two ways:

  freely      each layer's own greedy answer: its own likeliest token is fed back, up to its end of turn
  read along  the model's own final answer is given, and at each of its positions stands the layer's likeliest token
              and that token's probability

What the run does not have yet is left out, with the command that makes it. The teacher runs here as well: it needs the
memory. Time: one generation for each target layer of each model.
"""

CACHE_INFO = """What a teacher cache is made of, how far it is, what it weighs, and how true it is to the teacher.

  python -m pipeline cache-info runs/demo
  python -m pipeline cache-info runs/demo/cache/sampled-3f2a9c1b --verify
  python -m pipeline cache-info runs/demo --sample 000017

CACHE is a cache's own folder, a run's cache/ or a run's folder; where several caches lie there, they are listed, and
one has to be named.

Shown: what it was made from, with all fingerprints; shards, samples, tokens, bytes, speed; and for each layer what was
measured while it was written, on a small random share of the tokens, against the dense distributions: entropy,
probability of the stored ids, bias and RMS of the KL, error of the gradient, and how far Algorithm 1's draw moves.

With --verify every shard is hashed and every record decoded, one process for each core; what is wrong is listed by file
and record, with the command that makes it right, and the exit code is 2. A cache that is not complete is verified as
far as it goes. With --sample, each layer's likeliest id for each response token of a sample, in words, instead.
"""


ENV = """What a bug report needs: versions, commit, devices, MPI, and where the shipped recipes lie.

  python -m pipeline env
  python -m pipeline env --json
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; imports nothing heavy."""
    parser = _manual(argparse.ArgumentParser, prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add, name, summary, text in (
        (_add_status, "status", "what a run has done, and what to run next", STATUS),
        (_add_evaluate, "evaluate", "compare models on held-out data", EVALUATE),
        (_add_trace, "trace", "what each layer says about one question", TRACE),
        (_add_cache_info, "cache-info", "what a teacher cache holds, and how true it is", CACHE_INFO),
        (_add_env, "env", "what a bug report needs: versions, devices, commit", ENV),
    ):
        command = _manual(commands.add_parser, name=name, help=summary, description=text)
        add(command)
        command.add_argument("--verbose", action="store_true", help="let libraries log what they like")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 2 with a message for what the user can put right."""
    options = parse(arguments)
    from data_prep.schema import DataError as ShardError
    from pipeline.errors import SampleError, UserError
    from pipeline.runtime.logs import filter_logs

    filter_logs(options.verbose)
    try:
        COMMANDS[options.command](options)
    except (UserError, ShardError, SampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _manual(make, **settings):
    return make(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]DIR",
        help="a Hugging Face VLM folder; again for each model; without a NAME, the folder's name is its name",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run's folder: its teacher and students")
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="shard folder with manifest.json, as in X/held_out")
    parser.add_argument(
        "--baseline-data", type=Path, metavar="SHARDS",
        help="what question_only learns from (default: the run's data.train, or X/train beside X/held_out)",
    )  # fmt: skip
    parser.add_argument("--limit", type=_positive, metavar="N", help="read the first N samples only")
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="samples at once (default: 32)")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument(
        "--max-bad-share", type=_share, metavar="SHARE",
        help="stop when more of the samples cannot be used (default: data.max_bad_share of the run, else 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON of all results (default with --run: RUN/evaluation.json)"
    )


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture")
    parser.add_argument("--question", metavar="TEXT", help="a question about it")
    parser.add_argument("--sample", metavar="KEY", help="instead: the last question of this sample")
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="where it is (default: the recipe's data.held_out)")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=32, metavar="N", help="longest answer (default: 32)"
    )


def _add_cache_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", type=Path, metavar="CACHE", help="a cache's folder, a run's cache/ or a run's folder")
    parser.add_argument("--verify", action="store_true", help="hash every shard again and decode every record")
    parser.add_argument("--sample", metavar="KEY", help="what each layer said about this sample, in words")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="reads the ids of --sample (default: the run's teacher's)"
    )


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, found {text!r}")
    return share


def _status(options: argparse.Namespace) -> None:
    from pipeline.results.status import show, status

    show(options.run, *status(options.run))


def _evaluate(options: argparse.Namespace) -> None:
    from pipeline.results.evaluate import scoreboard
    from pipeline.results.evaluate.evaluation import evaluate, make_plan

    plan = make_plan(
        options.model, options.run, options.data, options.baseline_data, options.output, options.max_bad_share,
        limit=options.limit, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    scoreboard.show(evaluate(plan), plan)


def _trace(options: argparse.Namespace) -> None:
    from pipeline.results.trace import terminal

    terminal.run(options.run, options.image, options.question, options.sample, options.data, options.max_new_tokens)


def _cache_info(options: argparse.Namespace) -> None:
    from pipeline.results.cache import info

    info.run(options.cache, options.verify, options.sample, options.tokenizer)


def _env(options: argparse.Namespace) -> None:
    from pipeline.results import environment

    environment.show(options.json)


COMMANDS = {"status": _status, "evaluate": _evaluate, "trace": _trace, "cache-info": _cache_info, "env": _env}


if __name__ == "__main__":
    sys.exit(main())
