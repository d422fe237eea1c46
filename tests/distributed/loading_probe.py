"""Load a student and its verb-FFNs as the steps do, and tell what each rank held meanwhile.

Not a test: test_loading.py runs it. Arguments: recipe, a file of verb-FFNs, the folder for results. RANK.json has for
"drawn" and for "stored" verb-FFNs {"whole": bytes of one, "all": bytes of all, "kept": bytes that this rank holds of
them in the end, "peak": the most bytes of new tensors that it ever held}; both in values.safetensors.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.recipe.checks import target_layers
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.engine import Engine, sharded_loading, start, stop
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.families import text_config
from pipeline.vlm.verb_ffns import initial_verb_ffns, stored_verb_ffns


def held() -> int:
    """Bytes of all storages that tensors made since gc.freeze() hold, each counted once."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta]
    tensors += [p.ds_tensor for p in tensors if getattr(p, "ds_tensor", None) is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def kept() -> int:
    """What stays: a thread of the collectives may hold the last tensor that it sent for a moment longer."""
    gc.collect()
    found = [held()]
    for _ in range(20):
        time.sleep(0.1)
        found.append(held())
    return min(found)


class Peak(TorchDispatchMode):
    """The most bytes held after any operation that returned a large tensor."""

    def __init__(self, large: int):
        super().__init__()
        self.large, self.most = large, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and not x.is_meta and x.nbytes >= self.large for x in tree_leaves(out)):
            self.most = max(self.most, held())
        return out


def measured(make, width: int) -> tuple[dict[str, int], torch.nn.ModuleDict]:
    gc.freeze()  # what exists already is not looked at again
    with Peak(large=4 * width * width) as peak:
        ffns = make()
    whole = 4 * (3 * width * width + width)
    return {"whole": whole, "all": whole * len(ffns), "kept": kept(), "peak": peak.most}, ffns


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--local_rank")
    asked.add_argument("paths", nargs=3, type=Path)
    recipe_path, stored, folder = asked.parse_args().paths
    recipe, ranks = load_recipe(recipe_path).recipe, start()
    with sharded_loading(recipe, recipe.cache) as add_to:
        backbone = load_vlm(recipe.student.path, torch.float32)
        width = int(text_config(backbone).hidden_size)
        like = (target_layers(recipe.student), width, recipe.verbalizer.form, torch.float32)
        told, ffns = {}, torch.nn.ModuleDict()
        seed, add = recipe.seed, add_to(backbone)
        told["drawn"], ffns["drawn"] = measured(lambda: initial_verb_ffns(*like, seed, add), width)
        told["stored"], ffns["stored"] = measured(lambda: stored_verb_ffns(stored, *like, add), width)
    backbone.verb_ffns = ffns
    engine = Engine(backbone.requires_grad_(False), recipe, recipe.cache, ranks)
    weights = engine.gathered(engine.module.verb_ffns)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(told))
    if ranks.first:
        save_file(weights, folder / "values.safetensors")
    stop()


if __name__ == "__main__":
    main()
