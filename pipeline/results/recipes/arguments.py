"""The command line of `recipes`. It imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.results.argument_types import above_zero, positive

TEXT = """List the recipes that come with the package, show one, or write a first one for two models.

  python -m pipeline recipes
  python -m pipeline recipes qwen2_vl_72b_to_2b > recipe.yaml
  python -m pipeline recipes --for models/Qwen2-VL-72B-Instruct models/Qwen2-VL-2B-Instruct --data data/mine/train \\
    --gpus 64 --gpu-memory 80 --out recipe.yaml

With --for a teacher's and a student's folder, or folders with their config.json alone, give a recipe in which each
choice has its reason beside it: target layers (the paper's every 4th where the teacher then has more of them than the
student, denser ones of the teacher else, the paper's sparse ones where samples are mostly image tokens), batch sizes,
precision, LoRA. With --gpus and --gpu-memory, micro-batches and what else a step needs to fit come from the memory
model of `plan`; without them they are 1 and safe. With --data, the lengths of its samples are measured (this needs the
student's tokenizer), and the recipe is checked as a run would check it. It is a beginning: `plan` says what it costs,
and docs/evidence.md which presets suit which data.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `recipes`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this recipe")
    parser.add_argument(
        "--for", nargs=2, type=Path, metavar=("TEACHER", "STUDENT"), dest="models", help="write a first recipe for them"
    )
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="its training data, a shard folder")
    parser.add_argument("--gpus", type=positive, metavar="N", help="number of GPUs, over all nodes")
    parser.add_argument("--gpu-memory", type=above_zero, metavar="GIB", help="memory of one GPU in GiB (2^30 bytes)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the recipe there (default: print it); its run is runs/FILE, without the suffix",
    )


def run(options: argparse.Namespace) -> None:
    """List, show or write. Raises RecipeError where options contradict, or a recipe cannot be made."""
    from pipeline.errors import RecipeError
    from pipeline.recipe.shipped import shipped_recipe

    if options.models is None and (options.data or options.gpus or options.gpu_memory):
        raise RecipeError("--data, --gpus and --gpu-memory are for a new recipe; add --for TEACHER STUDENT")
    if options.models is not None and options.name is not None:
        raise RecipeError(f"expected one of NAME and --for, found both: {options.name} is a recipe by itself")
    if (options.gpus is None) != (options.gpu_memory is None):
        raise RecipeError("expected --gpus N and --gpu-memory GIB together: a plan needs both")
    if options.models is not None:
        _give(_first(options), options.out)
    elif options.name is not None:
        _give(shipped_recipe(options.name).text, options.out)
    elif options.out is not None:
        raise RecipeError("--out: name the recipe to write, as in: python -m pipeline recipes NAME --out FILE")
    else:
        from pipeline.results.recipes.listing import show

        show()


def _first(options: argparse.Namespace) -> str:
    from pipeline.results.plan.machine import Machine
    from pipeline.results.recipes.first import first_recipe

    machine = Machine(options.gpus, options.gpu_memory) if options.gpus is not None else None
    teacher, student = options.models
    return first_recipe(teacher, student, options.data, machine, options.out.stem if options.out else None)


def _give(text: str, out: Path | None) -> None:
    from data_prep.atomic import write_file

    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text.encode())
        print(f"{out}: written", file=sys.stderr)
