"""`make docs`: the documentation site from docs/, README, the recipes, the recipe's fields and the commands' help.

  python -m docs.site                     # build/docs/site/index.html
  python -m docs.site --output FOLDER     # FOLDER/site/index.html

A link that leads nowhere, also to a heading, is an error. The site opens from disk and loads nothing from a network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from docs.site.pages import write_pages

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Write the pages and build the site. Returns the exit code of the generator, 0 without a broken link."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.site", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "docs", metavar="FOLDER",
        help="replaced: its pages/ and its site/ (default: build/docs)",
    )  # fmt: skip
    output = parser.parse_args(arguments).output
    write_pages(ROOT, output)
    code = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(output / "mkdocs.yml")],
        check=False,
    ).returncode
    if code == 0:
        print(f"the site: {output / 'site' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
