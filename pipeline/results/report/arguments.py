"""The command line of `report`. It imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.results.argument_types import positive

TEXT = """Write a page about one run, or about several side by side: what was done, how it went, and what came of it.

  python -m pipeline report runs/demo                                       # runs/demo/report.html
  python -m pipeline report runs/demo runs/other --output report.html

Each step of a run writes the run's page when it ends (recipe: report). This command writes it at any time, and that of
several runs. It is read from the run's files alone, without a model, so also from a run that is still going or has
died: the steps and what they ran on, the losses of each layer over time, the matches and the entropy of their draw, the
KL of student to teacher layers, the cache's size and fidelity, speed and waiting for data, the evaluation with
intervals, rejected samples with reasons, and the recipe with the origin of each value. Of several runs first what
differs in their recipes, then all in one plot. The page is one file that opens offline.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html in the folder of the one run)"
    )


WATCH = """Follow a run: write its report again and again, as a page that reloads itself, until it is done or Ctrl-C.

  python -m pipeline watch runs/demo                       # open runs/demo/report.html in a browser
  python -m pipeline watch runs/demo --every 300

It reads the run's files, so it may run beside the job, on another machine that sees them, and it starts no server. To
look from elsewhere let python's own serve the folder, on the machine that has it, through ssh:

  python -m http.server 8000 --bind 127.0.0.1 --directory runs/demo
  ssh -L 8000:127.0.0.1:8000 HOST                          # from where the browser is
  http://127.0.0.1:8000/report.html

Whoever has an account on that machine can read what is served. The last page is written without the reload.
"""


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `watch`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--every", type=positive, default=30, metavar="SECONDS", help="between two pages (default: 30)")


def run_watch(options: argparse.Namespace) -> None:
    """Follow the run that the command line names."""
    from pipeline.results.report.watch import watch

    watch(options.run, options.every)


def run(options: argparse.Namespace) -> None:
    """Write the report that the command line asks for."""
    from pipeline.results.report import run as command

    command.run(options.runs, options.output)
