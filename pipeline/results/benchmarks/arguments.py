"""The part of `evaluate`'s command line that speaks of benchmarks. Imports no heavy package."""

from __future__ import annotations

import argparse
from pathlib import Path

TEXT = """
With --benchmarks, lmms-eval (extra `eval`) runs the field's benchmarks on the models instead, with its own data; with
--run on pictures within its recipe's data.max_pixels, as the student was trained:

  python -m pipeline evaluate --run runs/demo --benchmarks ai2d,chartqa,mmmu,mmb,mmvet
  python -m pipeline evaluate --model Qwen2-VL-2B --benchmarks mmstar,my_task:exact_match --include-path tasks \\
    --output benchmarks.json

The paper's columns: qbench, ai2d, chartqa, pope, hallb, mme, mathvista, mmb, mmb-cn, mmvet, mmmu. Its challenging ones
beside those: mmvet-v2, mmstar, seed2plus, blink, cvbench, llava-wilder. Any other task of lmms-eval: TASK:METRIC. The
table has the paper's numbers below. Scores are written to --output (default with --run: RUN/benchmarks.json) after
each benchmark; the same command keeps what is there of the same model, task settings and lmms-eval. A benchmark without
its score, for whatever reason, is an error by name. docs/benchmarks.md says which need a judge behind an API, and how
to install lmms-eval.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only --benchmarks needs."""
    parser.add_argument("--benchmarks", metavar="NAME,...", help="run these benchmarks by lmms-eval instead")
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="with --benchmarks: folder of further lmms-eval tasks"
    )
    parser.add_argument(
        "--eval-python", type=Path, metavar="FILE",
        help="with --benchmarks: the interpreter of an environment that has lmms-eval (default: this one)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Run the command: benchmarks on models, then the table."""
    from pipeline.results.benchmarks import table
    from pipeline.results.benchmarks.plan import make_plan
    from pipeline.results.benchmarks.run import run

    plan = make_plan(options)
    table.show(run(plan), plan)
