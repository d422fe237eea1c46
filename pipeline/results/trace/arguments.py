"""The command line of `trace`. It imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.storage import location_argument
from pipeline.results.argument_types import positive

TEXT = """Show what each target layer of a model predicts on the way to an answer (paper, Figure 3).

  python -m pipeline trace --run runs/demo --image tiles.png --question "what comes next?"
  python -m pipeline trace --run runs/demo --sample 000017
  python -m pipeline trace --run runs/demo --sample 000017 --data shards/train --page trace.html
  python -m pipeline trace --run runs/demo --limit 20 --page traces
  python -m pipeline trace --run runs/demo --changed
  python -m pipeline trace --model Qwen2-VL-2B --image tiles.png --question "what comes next?" --page trace.html

With --run the models are the teacher, the untouched student and the distilled student. The distilled student uses the
untouched student's verbalizers, which are not trained again. There are two kinds of tables:

  freely      each layer's own greedy answer: its own most likely token is fed back, until its end-of-turn token
  read along  an answer is the input; for each of its positions the table has the layer's most likely token and its
              probability. The answer is the model's own final one; with --answer and --limit the expected one

With --page the same becomes an HTML page that opens offline, with the ten likeliest tokens of each cell and the layers
that were matched; docs/reading_a_trace.md explains it. With --limit there is a page for each question and an index of
them, those first that changed most between the untouched and the distilled student. With --model no run is needed:
every layer is read through the logit lens, the model's own norm and head without trained verbalizers.

With --changed the samples are those by which RUN/evaluation.json tells the untouched from the distilled student: the
first, by key, that went from wrong to right, from right to wrong, and that both had wrong. Their pages go to
RUN/traces, and the run's report shows them from then on; so does TensorBoard, if the run logs to it.

A model that the run does not have yet is left out, and the command that makes it is shown. The teacher runs too, last,
spread over the GPUs at hand if one is too small; with --without-teacher only the students do. What the teacher's layers
said of a sample in the cache is shown by cache-info --sample, without the teacher. Time: one generation for each target
layer of each model.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trace`."""
    parser.add_argument("--run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]DIR", dest="models",
        help="instead of a run: a Hugging Face VLM folder, read through the logit lens; repeat for each model",
    )  # fmt: skip
    parser.add_argument("--without-teacher", action="store_true", help="trace the run's students only")
    parser.add_argument("--image", type=Path, metavar="FILE", help="an image")
    parser.add_argument("--question", metavar="TEXT", help="a question about the image")
    parser.add_argument("--answer", metavar="TEXT", help="read along this answer, not along each model's own")
    parser.add_argument("--sample", metavar="KEY", help="instead of an image: the last question of this sample")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="instead: N samples, evenly spaced, read along their answers"
    )
    parser.add_argument(
        "--changed",
        action="store_true",
        help="instead: one sample for each way in which answers changed, into RUN/traces and the run's report",
    )
    parser.add_argument(
        "--data",
        type=location_argument,
        metavar="SHARDS",
        help="shard folder of the samples (default: the recipe's data.held_out; with --changed what was evaluated)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="maximum answer length in tokens (default: 32)"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write an HTML page that opens offline; with --limit a folder",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this JSON file")


def run(options: argparse.Namespace) -> None:
    """Trace what the command line asks for."""
    from pipeline.results.trace import run as command

    names = (
        "run", "models", "image", "question", "answer", "sample", "limit", "changed", "data", "max_new_tokens",
        "without_teacher", "page", "json",
    )  # fmt: skip
    command.run(command.Asked(**{name: getattr(options, name) for name in names}))
