"""One check, in this process: python -m bench.gpu.check NAME --device cuda --output FILE --place FOLDER.

`make check-gpu` starts each of its checks so, under its own time limit.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


def main() -> None:
    """Run the check; its figures are in the output file as soon as each is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a module of bench/gpu/checks, and after a colon what it is to check, if it asks")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="the check's JSON")
    parser.add_argument("--place", type=Path, required=True, help="folder for what the checks leave for one another")
    arguments = parser.parse_args()
    module, _, part = arguments.name.partition(":")
    from bench.gpu.device import Device
    from bench.gpu.figures import Report
    from bench.gpu.shapes import shapes_of

    check = importlib.import_module(f"bench.gpu.checks.{module}")
    run = check.run if not part else lambda *inputs: check.run(*inputs, part)
    run(Report(arguments.output), Device(arguments.device), shapes_of(arguments.device), arguments.place)


if __name__ == "__main__":
    main()
