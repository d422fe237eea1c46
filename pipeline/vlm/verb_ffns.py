"""Make a model's verb-FFNs, one at a time: drawn from a seed, or read from a file that stage 1 wrote.

The verb-FFNs of a large model are a model themselves (4.0 billion parameters for 20 layers of width 8,192), so nobody
holds all of them whole unless `add` keeps them so: each is filled and handed to `add` before the next one exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.commands import train_command
from pipeline.errors import RecipeError
from pipeline.vlm.verbalizer import VerbFFN

Fill = Callable[[], None]
"""Gives a module its values."""

Add = Callable[[nn.Module, Fill], None]
"""(a new module on the CPU without values, what fills it): keeps what this rank needs of the filled module."""

AddTo = Callable[[nn.Module], Add]
"""(a model): what adds modules to it, so that they lie as its own parts do."""


def whole(_module: nn.Module, fill: Fill) -> None:
    """Keep the module as it is: every rank fills it, and holds all of it."""
    fill()


def whole_beside(_model: nn.Module) -> Add:
    """Add modules to a model that every rank holds whole."""
    return whole


def initial_verb_ffns(
    layers: Sequence[int], width: int, form: str, dtype: torch.dtype, seed: int, add: Add = whole
) -> nn.ModuleDict:
    """Verb-FFNs for the given layers, keyed by layer number, the same for a seed whatever the number of ranks."""
    blocks = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            block = _empty(width, form, dtype)
            add(block, block.draw)
            blocks[str(layer)] = block
    return blocks


def stored_verb_ffns(
    path: Path, layers: Sequence[int], width: int, form: str, dtype: torch.dtype, add: Add = whole
) -> nn.ModuleDict:
    """Verb-FFNs for the given layers, keyed by layer number, as a file of stage 1 has them. Nothing is drawn.

    Raises RecipeError if they are for other layers or another form: on all ranks, before any of them waits for another.
    """
    blocks = nn.ModuleDict()
    with ExitStack() as stack:
        file = _open(path, stack)
        _check(path, file, layers, _empty(width, form, dtype, device="meta"))
        for layer in layers:
            block = _empty(width, form, dtype)
            add(block, partial(_read, file, f"{layer}.", block))
            blocks[str(layer)] = block
    return blocks


def save_verb_ffns(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write verb-FFNs, {"LAYER.PART.weight": tensor}, whole or not at all: the form that stored_verb_ffns reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file(dict(weights), aside)
    aside.replace(path)


def _empty(width: int, form: str, dtype: torch.dtype, device: str = "cpu") -> VerbFFN:
    """A verb-FFN whose memory nobody has written to yet: on a CPU it takes none until then."""
    return VerbFFN(width, form, dtype, device="meta").to_empty(device=device)


def _open(path: Path, stack: ExitStack):
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except FileNotFoundError:
        again = train_command(1, path.parents[1] / "recipe.yaml")
        raise RecipeError(f"no verbalizers at {path}; run: {again}") from None
    except SafetensorError as error:
        raise RecipeError(f"{path} is no whole safetensors file: {error}") from error


def _check(path: Path, file, layers: Sequence[int], like: VerbFFN) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in like.named_parameters()}
    expected = {f"{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}
    names = file.keys()
    found = {name: file.get_slice(name).get_shape() for name in names}
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise RecipeError(
                f"{path} holds verbalizers for other layers, another width or another form than the recipe asks for "
                f"(layers {list(layers)}): expected {name} {_said(expected.get(name))}, found {_said(found.get(name))}"
            )


def _said(shape: list[int] | None) -> str:
    return "nowhere" if shape is None else f"of shape {shape}"


@torch.no_grad()
def _read(file, prefix: str, block: VerbFFN) -> None:
    for name, parameter in block.named_parameters():
        parameter.copy_(file.get_tensor(prefix + name))
