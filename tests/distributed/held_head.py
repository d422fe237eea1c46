"""How much of a cached teacher head a rank holds once the engine of the interaction step has it.

Not a test: test_held_head.py runs it, with a recipe and a cache folder. Each rank prints the bytes of all large tensors
that are alive, and the sum of the head as a forward sees it.
"""

import argparse
import gc
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pipeline.cache.head import read_head
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime import engine
from pipeline.vlm.verbalizer import StoredHead

LARGE = 2**16


class Step(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self):
        return self.head(lambda hidden, unembedding: unembedding.weight.double().sum(), None)


def held_bytes() -> int:
    """Bytes of the large storages that any tensor uses."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gc holds objects that warn when they are looked at
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(size for size in storages.values() if size >= LARGE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("cache", type=Path)
    options = parser.parse_args()
    ranks = engine.start()
    step = Step(StoredHead(read_head(options.cache, None, "cpu")))
    recipe = load_recipe(options.recipe).recipe
    made = engine.Engine(step, recipe, recipe.cache, ranks)
    total = made().item()
    print(f"rank {ranks.rank}: {held_bytes()} bytes, sum {total}", flush=True)
    engine.stop()


if __name__ == "__main__":
    main()
