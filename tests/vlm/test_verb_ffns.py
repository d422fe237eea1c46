"""Verb-FFNs are made one at a time: the values of all at once, never two unfinished, and none drawn for a file."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import RecipeError
from pipeline.vlm import verb_ffns
from pipeline.vlm.verb_ffns import initial_verb_ffns, save_verb_ffns, stored_verb_ffns
from pipeline.vlm.verbalizer import VerbFFN

LAYERS = (1, 3, 4)
FORMS = ("residual", "paper")


def all_at_once(layers, width, form, dtype, seed) -> dict[str, torch.Tensor]:
    """All verb-FFNs drawn whole, one after the other, and only then the zeros: how every rank once made them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = nn.ModuleDict({str(layer): VerbFFN(width, form, dtype) for layer in layers})
    if form == "residual":
        for block in blocks.values():
            nn.init.zeros_(block.down.weight)
    return blocks.state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.fixture(params=FORMS)
def trained(request, tmp_path):
    """(form, file) of verb-FFNs whose every value was moved."""
    weights = {k: v + torch.randn_like(v) for k, v in all_at_once(LAYERS, 16, request.param, torch.float32, 1).items()}
    save_verb_ffns(weights, tmp_path / "verbalize" / "student.safetensors")
    return request.param, tmp_path / "verbalize" / "student.safetensors"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_at_a_time_draws_what_all_at_once_drew(form, dtype):
    before = torch.get_rng_state()
    found = initial_verb_ffns(LAYERS, 16, form, dtype, seed=7).state_dict()
    assert_equal(found, all_at_once(LAYERS, 16, form, dtype, 7))
    assert torch.equal(torch.get_rng_state(), before), "a run's own random numbers must not depend on it"


def test_each_is_added_before_the_next_one_exists(trained):
    """Whoever adds them may drop each one's values: then at most one is whole at any time."""
    form, path = trained

    def drop(block, fill):
        fill()
        blocks = [o for o in gc.get_objects() if type(o) is VerbFFN]
        values = sum(p.numel() for o in blocks for p in o.parameters() if not p.is_meta)
        assert values == sum(p.numel() for p in block.parameters()), "another verb-FFN holds values"
        for parameter in block.parameters():
            parameter.data = torch.empty(0)

    assert len(initial_verb_ffns(LAYERS, 16, form, torch.float32, 1, drop)) == len(LAYERS)
    assert len(stored_verb_ffns(path, LAYERS, 16, form, torch.float32, drop)) == len(LAYERS)


def test_from_a_file_nothing_is_drawn_and_every_value_is_the_file_s(trained, monkeypatch):
    form, path = trained
    monkeypatch.setattr(VerbFFN, "draw", lambda self: pytest.fail("drawn for nothing"))
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda to, **_: to.is_meta or pytest.fail("drawn for nothing"))
    assert_equal(stored_verb_ffns(path, LAYERS, 16, form, torch.float32).state_dict(), load_file(path))
    rounded = {name: value.bfloat16() for name, value in load_file(path).items()}
    assert_equal(stored_verb_ffns(path, LAYERS, 16, form, torch.bfloat16).state_dict(), rounded)


def test_a_rank_that_does_not_fill_them_reads_no_value(trained, monkeypatch):
    """Under ZeRO-3 every rank but the first: the names and shapes in the file's head are all that it needs."""
    form, path = trained
    monkeypatch.setattr(verb_ffns, "_read", lambda *_: pytest.fail("read for nothing"))
    seen = []
    stored_verb_ffns(path, LAYERS, 16, form, torch.float32, lambda block, fill: seen.append(block))
    assert len(seen) == len(LAYERS)


@pytest.mark.parametrize(
    ("layers", "width", "form", "told"),
    [
        ((1, 3), 16, "residual", r"expected 4.down.weight nowhere, found of shape \[16, 16\]"),
        ((1, 2, 3, 4), 16, "residual", r"expected 2.down.weight of shape \[16, 16\], found nowhere"),
        (LAYERS, 32, "residual", r"expected 1.down.weight of shape \[32, 32\], found of shape \[16, 16\]"),
        (LAYERS, 16, "paper", r"expected 1.norm.weight nowhere, found of shape \[16\]"),
    ],
)
def test_verb_ffns_for_other_layers_are_refused(layers, width, form, told, tmp_path):
    path = tmp_path / "verbalize" / "v.safetensors"
    save_verb_ffns(all_at_once(LAYERS, 16, "residual", torch.float32, 0), path)
    expected = rf"other layers, another width or another form .*\[{', '.join(map(str, layers))}\].*{told}"
    with pytest.raises(RecipeError, match=expected):
        stored_verb_ffns(path, layers, width, form, torch.float32)


def test_no_file_and_half_a_file_are_refused(tmp_path):
    path = tmp_path / "verbalize" / "v.safetensors"
    with pytest.raises(RecipeError, match="run: deepspeed launch/train.py --stage 1"):
        stored_verb_ffns(path, LAYERS, 16, "residual", torch.float32)
    path.parent.mkdir()
    save_file(all_at_once(LAYERS, 16, "residual", torch.float32, 0), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="no whole safetensors file"):
        stored_verb_ffns(path, LAYERS, 16, "residual", torch.float32)
