"""The options of how a job prints, which train and cache share."""

from __future__ import annotations

import argparse


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--quiet, --log-format and --verbose."""
    parser.add_argument(
        "--quiet", action="store_true", help="no progress; what is said once, warnings and errors are printed"
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text",
        help="json: standard output has one JSON object a line (errors stay text, on standard error)",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="let libraries log what they like")


def choose_output(options: argparse.Namespace) -> None:
    """Let this process print as its command line says."""
    from pipeline.runtime.display import progress
    from pipeline.runtime.display.logs import filter_logs

    filter_logs(options.verbose)
    progress.choose_output(options.quiet, options.log_format)
