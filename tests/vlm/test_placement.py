"""Where a model goes, from sizes alone, and that a model in parts answers as a whole one does."""

from dataclasses import replace

import pytest
import torch
from tiny import KINDS, MORE_KINDS, png, turn, write_vlm

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Data, ModelParts
from pipeline.results.generate import greedy, load, placement
from pipeline.vlm.backbone import load_vlm, run_backbone
from pipeline.vlm.parts import parts_of
from pipeline.vlm.placement import check_fits_cpu, device_groups, device_map, weight_bytes

GB = 10**9
CARDS = [79 * GB] * 8


@pytest.mark.parametrize(
    ("weights", "free", "most", "groups"),
    [
        (16, CARDS, None, [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,)]),  # a 7B student: one process a card
        (16, CARDS, 3, [(0,), (2,), (4,)]),
        (16, CARDS, 1, [(0,)]),  # not spread where one card has room
        (147, CARDS, None, [(0, 1, 2, 3), (4, 5, 6, 7)]),  # a 72B teacher takes three cards: two processes
        (147, CARDS, 1, [(0, 1, 2, 3, 4, 5, 6, 7)]),
        (147, CARDS[:3], None, [(0, 1, 2)]),
        (16, [79 * GB, 2 * GB], None, [(0,)]),  # another job has the second card
        (16, [], None, [()]),
        (16, [], 3, [(), (), ()]),
    ],
)
def test_as_many_copies_as_fit_each_on_few_devices(weights, free, most, groups):
    assert device_groups(weights * GB, free, most) == groups


def test_a_model_that_fits_nowhere_is_refused_with_sizes():
    with pytest.raises(RecipeError, match=r"take 147.0 GB, and the 2 GPU\(s\) at hand have 79.0 GB, 40.0 GB free"):
        device_groups(147 * GB, [79 * GB, 40 * GB])
    with pytest.raises(RecipeError, match="--processes 3: there are 2 GPUs"):
        device_groups(GB, CARDS[:2], 3)
    with pytest.raises(RecipeError, match=r"2 x 30.0 GB of weights exceed the 50.0 GB of memory .* --processes"):
        check_fits_cpu(30 * GB, 50 * GB, 2)
    check_fits_cpu(30 * GB, 60 * GB, 2)


@pytest.mark.parametrize("tie", [False, True])
def test_weight_bytes_are_those_of_the_loaded_model(tmp_path, tie):
    folder = write_vlm(tmp_path, "qwen2_vl", 3, 32, tie=tie)
    loaded = sum(weight.nbytes for weight in load_vlm(folder, torch.float32).parameters())
    assert weight_bytes(folder, torch.float32) == loaded == 2 * weight_bytes(folder, torch.bfloat16)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_a_map_names_every_weight_once_and_cuts_no_layer(tmp_path, kind):
    folder = write_vlm(tmp_path, kind, 6, 32)
    size = weight_bytes(folder, torch.float32)
    found = device_map(folder, torch.float32, {3: int(0.8 * size), 5: int(0.8 * size)})
    assert set(found.values()) == {3, 5}
    model = load_vlm(folder, torch.float32)
    held = dict.fromkeys((3, 5), 0)
    for name, weight in model.named_parameters():
        (device,) = [device for part, device in found.items() if f"{name}.".startswith(f"{part}.")]
        held[device] += weight.nbytes
    assert sum(held.values()) == size and min(held.values()) > 0.2 * size
    parts = parts_of(model)
    whole = (*parts.vision, *(f"{parts.layers}.{layer}" for layer in range(6)))
    assert not any(part.startswith(f"{name}.") for part in found for name in whole)


def test_a_model_is_spread_by_the_parts_that_the_recipe_names(tmp_path, monkeypatch):
    """Without them a model whose parts are not recognised would run on one device, and on two not at all."""
    folder = write_vlm(tmp_path, "qwen2_vl", 3, 32)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    size = weight_bytes(folder, torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))
    assert set(placement(folder, torch.float32, (0, 1), ModelParts(vision=("model.visual",))).values()) == {0, 1}
    with pytest.raises(RecipeError, match="the recipe names nowhere, and the model has no such module"):
        load(folder, Data(train="x"), (0, 1), parts=ModelParts(vision=("nowhere",)))


def test_parts_that_do_not_fit_are_refused_with_sizes(tmp_path):
    folder = write_vlm(tmp_path, "qwen2_vl", 6, 32)
    half = weight_bytes(folder, torch.float32) // 2
    with pytest.raises(RecipeError, match=r"GB of weights do not fit the devices 0 \(room for .*first .*more GPUs"):
        device_map(folder, torch.float32, {0: half})


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_a_model_in_parts_computes_what_it_computes_whole(tmp_path, kind):
    """A CPU has one device to compute on; so the layers' weights lie on the disk, and come for each call."""
    vlm = load(write_vlm(tmp_path, kind, 4, 32, seed=1), Data(train="x", max_length=512))
    size = weight_bytes(tmp_path, torch.float32)
    whole = device_map(tmp_path, torch.float32, {0: size, 1: size})
    parts = {name: "disk" if ".layers." in name or "vis" in name else "cpu" for name in whole}
    in_parts = replace(vlm, model=load_vlm(tmp_path, torch.float32, device_map=parts))
    assert set(in_parts.model.hf_device_map.values()) == {"cpu", "disk"}
    prompt = vlm.encoder.prompt([turn("user", "<image>", "what comes next?")], [png(seed=5)])
    assert greedy(in_parts, prompt, 6) == greedy(vlm, prompt, 6)
    with torch.no_grad():
        states = [run_backbone(one.model, prompt, [2, 4], torch.arange(3)) for one in (vlm, in_parts)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))
