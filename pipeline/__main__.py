"""Plan a run, and inspect its results.

  python -m pipeline recipes
  python -m pipeline plan --recipe recipes/NAME.yaml --gpus 64 --gpu-memory 80
  python -m pipeline status runs/demo
  python -m pipeline evaluate --run runs/demo
  python -m pipeline answer --run runs/demo --output data/answered
  python -m pipeline trace --run runs/demo --image tiles.png --question "what comes next?"
  python -m pipeline report runs/demo
  python -m pipeline watch runs/demo
  python -m pipeline push runs/demo --to OWNER/MODEL --dry-run
  python -m pipeline cache-info runs/demo
  python -m pipeline env

recipes lists the recipes that come with the package, and writes a first one for two models.
plan says what a recipe will need, before anything is started. status shows which steps are done and what to run next.
evaluate compares models on held-out data. answer lets a model answer the questions of a shard folder. trace shows what
each layer of a model predicts. report writes a page about one run or several; watch writes it again and again, to
follow a run. push uploads the student with its model card. cache-info shows what a teacher cache holds, and how close
it is to the teacher. env prints what a bug report needs.
`python -m pipeline COMMAND --help` describes one command in full. Runs are made by launch/train.py, data by
python -m data_prep.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.storage import location_argument
from pipeline.results import push
from pipeline.results.argument_types import part, positive, share
from pipeline.results.benchmarks import arguments as benchmarks
from pipeline.results.plan import arguments as plan
from pipeline.results.recipes import arguments as recipes
from pipeline.results.report import arguments as report
from pipeline.results.trace import arguments as trace

STATUS = """Show which steps of a run are begun or done, their last losses, disk usage, and the command to run next.

  python -m pipeline status runs/demo
  python -m pipeline status runs/demo --watch

For a step that trains it also says how long the rest takes at the pace of its newest updates. Where launch.submit has
put the run into SLURM, its jobs are shown too: queued, running, requeued or failed, and why.
"""

EVALUATE = """Measure exact match of greedy answers and perplexity on held-out data, for one or several models.

  python -m pipeline evaluate --run runs/demo
  python -m pipeline evaluate --run runs/demo --without-teacher
  python -m pipeline evaluate --run runs/demo --model finetuned=runs/plain/student --against finetuned
  python -m pipeline evaluate --model Qwen2-VL-2B --data shards/held_out --limit 500 --output evaluation.json
  python -m pipeline evaluate --model teacher=models/72b --model student=models/2b --data shards/held_out

With --run: the run's teacher, its untouched student and its distilled student, on the recipe's data.held_out. The
smallest model comes first. --output is written after each, whole or not at all, and the same command goes on after an
interruption: a result that is there already is kept while the model, the data and the settings are the same. The batch
size and the number of processes are no such settings: they change rounding errors only. Results of other models on the
same questions stay in the file and in the table. To measure again, remove the file. With --run the student's model card
(RUN/student/README.md) is written anew with the results, unless it has become your own.

On GPUs, as many copies of a model work side by side as there is room for, each in a process of its own; a model that is
too large for one GPU is spread over several. --processes N sets a lower number, and on a CPU the number.

Exact match: each model answers the last question of each chat greedily, with all earlier turns as input. An answer is
correct if it equals the reference answer after both are normalised: Unicode NFKC, lower case, white space collapsed and
stripped, and any of . , ; : ! ? stripped at the end unless nothing else is left. Articles are kept. The share of
correct answers is shown in total and, if the data has question types, for each type.

The 95 % interval of a share is Wilson's, in points. --against NAME compares each other model with one of them, on the
samples that both answered, and says whether the difference is within chance: by a 95 % interval of paired differences
and by McNemar's exact test, which is the stricter where few samples differ. All speak of this data, not of training
again with another seed. The JSON has the keys that each model answered wrongly, and how many answers were cut at
--max-new-tokens.

Perplexity: exp of the mean cross-entropy (nat) over all response tokens, end-of-turn tokens included; these are the
tokens that the models are trained on. Models of different tokenizers have other tokens, and a note says so: their
perplexities cannot be compared.

The table also has a baseline, `question_only`: the most common answer to the same question in training data, without
the image. For a question that is not in the training data it is the most common answer overall. What a model gains
over this baseline, it gains from the image.

Samples that a model cannot use are counted and listed: read = used + rejected. If their share exceeds --max-bad-share,
the evaluation stops: results on the remaining samples would not be results on this data. Models run in float32 on a
CPU. On a GPU they run in the dtype of their config.json, else in bfloat16.
"""

ANSWER = """Let a model, usually the teacher, answer the questions of a shard folder: shards in, shards out.

  python -m pipeline answer --run runs/demo --output data/answered
  python -m pipeline answer --model Qwen2-VL-72B --data data/mine/train --output data/answered
  python -m pipeline answer --run runs/demo --output data/answered --part 1/8

With --run: the run's teacher, on the recipe's data.train, under the recipe's limits on data.

Each assistant turn gets the model's greedy answer as its text, after the model's own earlier answers. Keys, order,
images and all other fields stay. The record's new field `answered` has, for each assistant turn, the text that was
given, the natural log of the model's probability of its answer, and the answer's number of tokens, end-of-turn token
included. The output is an ordinary shard folder: `reinforce.train: data/answered` in a recipe finetunes the student on
it; recipes/teacher_answers.yaml does that alone, without stage 1.

Samples without a usable answer are left out and listed in OUTPUT/rejects.jsonl: too long, not to be decoded, or with an
answer that is empty, contains a control token, or did not end within --max-new-tokens. read = used + rejected. If their
share exceeds --max-bad-share, the command stops.

Each shard appears whole or not at all; the same command continues after an interruption. With --part I/N the process
answers every N-th shard, starting with the I-th: N processes or SLURM array tasks share the work without knowing of one
another, and the last to end writes the manifest. On GPUs, as many copies of the model as there is room for share the
batches of a shard, each in a process of its own; a model that is too large for one GPU is spread over several.
--processes N sets a lower number, and on a CPU the number. Models run in float32 on a CPU. On a GPU they run in the
dtype of their config.json, else in bfloat16.
"""

CACHE_INFO = """Show what a teacher cache was made from, its progress, its size, and how close it is to the teacher.

  python -m pipeline cache-info runs/demo
  python -m pipeline cache-info runs/demo/cache/sampled-3f2a9c1b --verify
  python -m pipeline cache-info runs/demo --sample 000017
  python -m pipeline cache-info runs/demo --suspects --limit 50 --output suspects.jsonl

CACHE is a cache's own folder, a run's cache/ or a run's folder. If there are several caches, they are listed, and you
have to name one.

Shown: what the cache was made from, with all fingerprints; the numbers of shards, samples, tokens and bytes; the speed;
and for each layer its fidelity. Fidelity was measured while the cache was written, on a small random share of the
tokens, against the dense distributions: entropy, probability of the stored ids, bias and RMS of the KL, error of the
gradient, and how far Algorithm 1's draw moves.

With --verify every shard is hashed and every record is decoded, with one process per core. Problems are listed by file
and record, with the command that repairs the cache, and the exit code is 2. An incomplete cache is verified as far as
it exists. With --sample the command shows instead, for one sample, each layer's most likely id for each response token,
as text.

With --suspects the command shows instead the training samples whose given answer the teacher finds least likely: many
have a wrong answer. They are ranked by the mean log-probability of their response tokens under the teacher's last
layer, as far as the cache tells it; no model is loaded. Beside it is the least likely token, counted from 1, and the
question and the answer, where the run's data folder can be read. --output writes the whole ranking, one JSON object a
line. If the data was sharded with --noise, a last line says how many of the first suspects are known to be wrong.
"""


ENV = """Print what a bug report needs: versions, commit, devices, MPI, and where the shipped recipes are.

  python -m pipeline env
  python -m pipeline env --json
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; imports no heavy package."""
    parser = _manual(argparse.ArgumentParser, prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add, name, summary, text in (
        (recipes.add_arguments, "recipes", "the shipped recipes, and a first one for two models", recipes.TEXT),
        (plan.add_arguments, "plan", "what a recipe will need: memory, disk, network, hours", plan.TEXT),
        (_add_status, "status", "progress of a run, and what to run next", STATUS),
        (_add_evaluate, "evaluate", "compare models on held-out data", EVALUATE + benchmarks.TEXT),
        (_add_answer, "answer", "a model answers the questions of a shard folder", ANSWER),
        (trace.add_arguments, "trace", "what each layer predicts on the way to an answer", trace.TEXT),
        (report.add_arguments, "report", "a page about one run, or several side by side", report.TEXT),
        (report.add_watch_arguments, "watch", "follow a run: its report, written again and again", report.WATCH),
        (push.add_arguments, "push", "upload the student and its model card to the Hugging Face Hub", push.TEXT),
        (_add_cache_info, "cache-info", "what a teacher cache holds, and how close it is to the teacher", CACHE_INFO),
        (_add_env, "env", "what a bug report needs: versions, devices, commit", ENV),
    ):
        command = _manual(commands.add_parser, name=name, help=summary, description=text)
        add(command)
        command.add_argument("--verbose", action="store_true", help="do not filter the libraries' log messages")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 with a message for an error that the user can correct."""
    options = parse(arguments)
    from data_prep.atomic import storage_fault
    from data_prep.schema import DataError as ShardError
    from pipeline.errors import SampleError, UserError
    from pipeline.runtime.display.logs import filter_logs
    from pipeline.runtime.faults.stop import exit_at_signals

    filter_logs(options.verbose)
    if options.command in RESUMABLE:
        exit_at_signals(options.command)
    try:
        COMMANDS[options.command](options)
    except (UserError, ShardError, SampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (fault := storage_fault(error)) is None:
            raise
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


def _manual(make, **settings):
    return make(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--watch", action="store_true", help="renew it every 10 seconds, until Ctrl-C")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]DIR",
        help="a Hugging Face VLM folder; repeat for each model; without NAME the folder's name is used",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run's folder: evaluate its teacher and students")
    parser.add_argument(
        "--without-teacher", action="store_true",
        help="do not evaluate the run's teacher; a result of it that --output has already is still shown",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="NAME", help="say for each other model whether it differs from this one, sample by sample"
    )
    parser.add_argument(
        "--data", type=location_argument, metavar="SHARDS", help="shard folder with manifest.json, such as X/held_out"
    )
    parser.add_argument(
        "--baseline-data", type=location_argument, metavar="SHARDS",
        help="training data of question_only (default: the run's data.train, or X/train beside X/held_out)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N",
        help="read only N samples, evenly spaced over the data (with --benchmarks the first N)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="samples per batch (default: 32; with --benchmarks 1)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="maximum answer length in tokens (default: 64)"
    )
    parser.add_argument(
        "--max-bad-share", type=share, metavar="SHARE",
        help="stop if a larger share of samples cannot be used (default: the run's data.max_bad_share, else 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write all results to this JSON file (default with --run: RUN/evaluation.json)",
    )
    benchmarks.add_arguments(parser)
    _add_processes(parser)


def _add_answer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run's folder: its teacher answers its data.train")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face VLM folder (default: run's teacher)")
    parser.add_argument(
        "--data", type=location_argument, metavar="SHARDS", help="shard folder (default: the run's data.train)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="SHARDS_OUT", help="shard folder to write")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N",
        help="an answer that has not ended by then is rejected (default: 64)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="samples per batch (default: 32)")
    parser.add_argument(
        "--max-bad-share", type=share, metavar="SHARE",
        help="stop if a larger share of samples is rejected (default: the run's data.max_bad_share, else 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--part", type=part, default=(1, 1), metavar="I/N",
        help="answer only every N-th shard, starting with the I-th, from 1 (default: all)",
    )  # fmt: skip
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=positive, metavar="N",
        help="work with N copies of the model at most, each in a process with its own GPUs (default: as many as the "
        "GPUs have room for; without a GPU, 1)",
    )  # fmt: skip


def _add_cache_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cache",
        type=location_argument,
        metavar="CACHE",
        help="a cache's folder or URL, a run's cache/ or a run's folder",
    )
    parser.add_argument("--verify", action="store_true", help="hash every shard and decode every record")
    parser.add_argument("--sample", metavar="KEY", help="show instead each layer's most likely tokens for this sample")
    parser.add_argument(
        "--suspects", action="store_true", help="show instead the samples whose answer the teacher finds least likely"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="number of suspects shown (default: 20)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all suspects, ranked, to this JSONL file")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer that decodes the ids of --sample (default: the run's teacher's)",
    )


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status(options: argparse.Namespace) -> None:
    from pipeline.results.status import show, status, watch

    if options.watch:
        watch(options.run)
    else:
        show(options.run, *status(options.run))


def _evaluate(options: argparse.Namespace) -> None:
    if options.benchmarks is not None:
        benchmarks.run(options)
        return
    from pipeline.errors import RecipeError
    from pipeline.results.evaluate import scoreboard
    from pipeline.results.evaluate.evaluation import evaluate
    from pipeline.results.evaluate.plan import make_plan
    from pipeline.runtime.model_card.card import write_card

    for name in ("include_path", "eval_python"):
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} goes with --benchmarks")
    plan = make_plan(
        options.model, options.run, options.data, options.baseline_data, options.output, options.max_bad_share,
        options.against, options.without_teacher, limit=options.limit, batch_size=options.batch_size or 32,
        max_new_tokens=options.max_new_tokens or 64, processes=options.processes,
    )  # fmt: skip
    scoreboard.show(evaluate(plan), plan)
    if (
        options.run is not None
        and plan.output == options.run / "evaluation.json"
        and (options.run / "student").is_dir()
    ):
        write_card(options.run, options.run / "student")


def _answer(options: argparse.Namespace) -> None:
    from pipeline.results.answer.plan import make_plan
    from pipeline.results.answer.run import run

    plan = make_plan(
        options.model, options.run, options.data, options.output, options.max_bad_share, options.part,
        batch_size=options.batch_size, max_new_tokens=options.max_new_tokens, processes=options.processes,
    )  # fmt: skip
    run(plan)


def _cache_info(options: argparse.Namespace) -> None:
    from pipeline.results.cache import info

    info.run(
        options.cache, options.verify, options.sample, options.tokenizer,
        suspects=options.suspects, limit=options.limit, output=options.output,
    )  # fmt: skip


def _env(options: argparse.Namespace) -> None:
    from pipeline.results import environment

    environment.show(options.json)


COMMANDS = {
    "recipes": recipes.run,
    "plan": plan.run,
    "status": _status,
    "evaluate": _evaluate,
    "answer": _answer,
    "trace": trace.run,
    "report": report.run,
    "watch": report.run_watch,
    "push": push.run,
    "cache-info": _cache_info,
    "env": _env,
}
RESUMABLE = ("evaluate", "answer")
"""Commands that take long, and go on where they were ended."""


if __name__ == "__main__":
    sys.exit(main())
