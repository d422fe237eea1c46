"""Stage 2 with other losses than the product's: for arms that its users would not want as an option.

The recipe, the data, the cache, the training loop and the export are the product's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data_prep.shards import write_file
from pipeline.job import prepare
from pipeline.loss.matching import uniform_columns
from pipeline.runtime import engine
from pipeline.runtime.data.batches import derived_seed
from pipeline.runtime.loop import Job
from pipeline.signal import HiddenSignal, Signal
from pipeline.steps import interact, reinforce

STEPS = ("interact", "reinforce")
NO_STATES = (
    "these losses read the teacher's states, but the cache holds distributions: make it with "
    "--set verbalize.steps=0 cache.codec.name=hidden"
)


def main(module: type[interact.Interaction], description: str | None) -> None:
    """Run stage 2 on one process, with the arguments of launch/train.py. Raises UserError as its steps do."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(2,), required=True, help="stage 1 is that of launch/train.py")
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    resolved = prepare(options.recipe, options.overrides, STEPS, world=1)
    job = Job(resolved.recipe, engine.start())
    write_file(resolved.recipe.run / "recipe.yaml", resolved.to_yaml().encode())
    torch.manual_seed(derived_seed(resolved.recipe.seed, "module"))  # of parameters that the module adds
    interact.run(job, module)
    reinforce.run(job)
    engine.stop()


def teacher_states(signal: Signal) -> HiddenSignal:
    """The signal as the teacher's normed states. Raises ValueError for a cache of distributions."""
    if not isinstance(signal, HiddenSignal):
        raise ValueError(NO_STATES)
    return signal


def fixed_pairs(states: Tensor, signal: HiddenSignal) -> list[int]:
    """For each student target layer of states [S + 1, T, d], the column of the teacher layer that it follows."""
    return uniform_columns(len(states) - 1, signal.hidden.shape[1] - 1)
