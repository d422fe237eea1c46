"""Which shards one task of a cache array reads: prints A-B for `launch/cache.py --shards`, or nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data_prep.storage import is_file, read_bytes
from pipeline.errors import RecipeError
from pipeline.recipe.resolve import load_recipe


def shard_range(shards: int, task: int, tasks: int) -> str:
    """Part `task` (from 0) of `tasks` nearly equal, adjoining parts of shards 0..shards-1, as "A-B"; "" if it is empty.

    All parts together are every shard, once. Raises ValueError unless 0 <= task < tasks.
    """
    if not 0 <= task < tasks:
        raise ValueError(f"expected a task from 0 to {tasks - 1}, found {task}")
    first, after = shards * task // tasks, shards * (task + 1) // tasks
    return f"{first}-{after - 1}" if after > first else ""


def main() -> int:
    """Read the recipe and its data's manifest, print the range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="the run's recipe; its data.train names the shards")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="of the recipe"
    )
    parser.add_argument("--task", type=int, required=True, help="this task, from 0")
    parser.add_argument("--tasks", type=int, required=True, help="how many tasks there are")
    args = parser.parse_args()
    try:
        data = load_recipe(args.recipe, args.overrides).recipe.data.train
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    manifest = data / "manifest.json"
    if not is_file(manifest):
        print(f"no {manifest}: first make the shards that {args.recipe} names as data.train", file=sys.stderr)
        return 2
    shards = json.loads(read_bytes(manifest))["shards"]
    try:
        print(shard_range(len(shards), args.task, args.tasks))
    except ValueError as error:
        print(f"{error}; where parts run again, say of how many they are: TASKS=16 sbatch --array=7", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
