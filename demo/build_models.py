"""Train the models that the demo ships, from random weights, and write them as ordinary Hugging Face folders.

  python -m demo.build_models                         all pairs, into demo/models (over an hour on one CPU core)
  python -m demo.build_models --pair puzzles-deep     one pair
  python -m demo.build_models --role teacher --steps 200 --output /tmp/try      a quick look
  python -m demo.build_models --size wide --device cuda      wider and deeper, into build/wide/models, on a GPU

Each of teacher and student is a tiny Qwen2-VL. First its vision tower learns to name what it sees through one linear
layer, as towers come pretrained elsewhere; then the whole model learns to answer. The students learn too little on
purpose: they can see and answer, and leave the demo something to teach. What is measured stands in each model card.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo.training import TrainingPlan

PAIRS = ("puzzles", "puzzles-deep", "easy-vqa")
ROLES = ("teacher", "student")
MODELS = Path(__file__).parent / "models"
FOLDERS = {"demo": MODELS, "wide": Path("build/wide/models")}
"""Size -> where its pairs go."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    # After the arguments are read: --help should not wait for torch.
    import torch

    from demo.evaluation import SAMPLES, measure
    from demo.model_cards import write_card
    from demo.plans import PLANS, batches_for
    from demo.sizes import SIZES
    from demo.training import train
    from demo.vocabulary import INPUTS, build_tokenizer, write_processor

    torch.set_num_threads(options.threads)
    for pair in options.pair or PAIRS:
        for role in options.role or ROLES:
            begin = time.monotonic()
            plan = _plan(PLANS[pair, role], options)
            folder = (options.output or FOLDERS[options.size]) / pair / role
            print(f"== {pair} {role}: {plan}", flush=True)
            tokenizer = build_tokenizer(INPUTS[pair].words)
            model = train(
                SIZES[options.size][role], batches_for(pair, role), tokenizer, plan, options.device, options.seed
            )
            model.to(torch.bfloat16).save_pretrained(folder)
            write_processor(folder, INPUTS[pair])
            minutes = (time.monotonic() - begin) / 60
            measured = measure(folder, pair)
            words = f"exact match {measured:.3f} on {SAMPLES[pair]:,} held-out questions"
            write_card(folder, pair, role, options.size, plan, words, options.seed)
            print(f"{folder}: {words}, {minutes:.1f} minutes of training", flush=True)
            if measured < options.at_least:
                print(f"error: {folder} has not learnt its task: expected at least {options.at_least}", file=sys.stderr)
                return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.build_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", action="append", choices=PAIRS, help="which pair (default: all)")
    parser.add_argument("--role", action="append", choices=ROLES, help="which of a pair (default: both)")
    parser.add_argument(
        "--size", choices=FOLDERS, default="demo", help="layers and widths, demo/sizes.py (default: the shipped ones)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps of learning to answer (default: the plan's own)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: demo/models, for wide build/wide/models")
    parser.add_argument(
        "--at-least", type=float, default=0.0, metavar="SHARE", help="fail where exact match is lower (default 0)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="weights and batches (default 0)")
    return parser


def _plan(plan: TrainingPlan, options: argparse.Namespace) -> TrainingPlan:
    return plan if options.steps is None else replace(plan, steps=options.steps)


if __name__ == "__main__":
    sys.exit(main())
