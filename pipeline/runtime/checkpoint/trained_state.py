"""What trains, as a rank holds it: float32 masters and AdamW's moments, in pieces of parameters.

Under every ZeRO stage the optimizer has flat tensors, and a rank's flat tensor holds a span of each of some parameters:

    ZeRO 0       one flat tensor a parameter: the whole of it, on every rank
    ZeRO 1, 2    one flat tensor a rank: its share of all parameters laid end to end
    ZeRO 3       some flat tensors a rank: its share of each parameter, one after the other

So a state that was saved in spans of parameters can be read back in any other spans: on other ranks, in another stage.
DeepSpeed's public accessors (safe_get_local_optimizer_state and its like) cover ZeRO 3 only, cannot make moments that
do not exist yet, and under NVMe offload read a whole sub-group for each parameter. Nothing here imports deepspeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime.ranks import Ranks

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
ROOM = 2**24
"""Elements of the tensors that a copy is made in. torch rounds pinned memory up to a power of two, and keeps it: one
tensor of all elements could take twice its size."""
KINDS = (MASTER, *MOMENTS)
"""What is kept of each element: the float32 weight and AdamW's two moments."""


@dataclass(frozen=True)
class Span:
    """Elements start .. start + length - 1 of a parameter, counted over its flattened form."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A span's values."""

    span: Span
    step: float
    """How often AdamW has moved it."""
    values: Mapping[str, Tensor]
    """Kind -> float32 [length]."""


@dataclass(frozen=True)
class _Flat:
    """A tensor that the optimizer moves, and the spans in it, each with where it begins there."""

    key: Tensor
    spans: list[tuple[Span, int]]


class TrainedState:
    """The trained state of a module under DeepSpeed, on this rank."""

    def __init__(self, module: nn.Module, optimizer: Any, stage: int, ranks: Ranks):
        """optimizer: DeepSpeed's around AdamW, or AdamW itself under ZeRO 0. stage: the ZeRO stage."""
        self._stage, self._ranks = stage, ranks
        self._wrapper, self._adamw = optimizer, getattr(optimizer, "optimizer", optimizer)
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._flats = {0: self._whole, 3: self._shares}.get(stage, self._fragments)()
        if others := {flat.key.dtype for flat in self._flats} - {torch.float32}:
            raise TypeError(f"DeepSpeed's masters are {others}; a checkpoint keeps float32")

    @property
    def sizes(self) -> dict[str, int]:
        """{trained parameter: its elements}, those of all ranks."""
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in self._trained.items()}

    def spans(self) -> list[Span]:
        """What this rank saves, in the order of `pieces`. All ranks' together are all that trains, each once."""
        if self._stage == 0 and not self._ranks.first:
            return []  # all ranks hold the same
        return [span for flat in self._flats for span, _ in flat.spans]

    def pieces(self) -> Iterator[Piece]:
        """The pieces that this rank saves: views, which the next update changes."""
        if not self.spans():
            return
        for index, flat in enumerate(self._flats):
            with self._in_memory(index, changes=False):
                state = self._adamw.state.get(flat.key) or _new_state(flat.key)
                for span, at in flat.spans:
                    values = {kind: _flattened(flat.key, state, kind).narrow(0, at, span.length) for kind in KINDS}
                    yield Piece(span, float(state["step"]), values)

    @torch.no_grad()
    def restore(self, read: Callable[[Span], Piece]) -> None:
        """Take the values that `read` has of each span that this rank holds. All ranks must call."""
        if self._stage == 3:
            self._wrapper.checkpoint_event_prologue()  # frees the weights that it keeps whole
        for index, flat in enumerate(self._flats):
            with self._in_memory(index, changes=True):
                self._fill(flat, read)
                if self._stage == 3:
                    self._wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if self._stage == 3:
            self._wrapper.checkpoint_event_epilogue()  # gathers them anew
        elif self._stage:
            self._wrapper.update_lp_params()
        else:
            for parameter, flat in zip(self._trained.values(), self._flats, strict=True):
                parameter.copy_(flat.key)  # itself, but where the weights are in bfloat16

    def _fill(self, flat: _Flat, read: Callable[[Span], Piece]) -> None:
        state, steps = _new_state(flat.key), [0.0]
        for span, at in flat.spans:
            piece = read(span)
            steps.append(piece.step)
            for kind in KINDS:
                _flattened(flat.key, state, kind).narrow(0, at, span.length).copy_(piece.values[kind])
        # One count for the whole flat tensor: under ZeRO 0, a parameter that no batch reached has a lower one.
        self._adamw.state[flat.key] = {**state, "step": torch.full_like(state["step"], max(steps))}

    def _whole(self) -> list[_Flat]:
        keys = [key for group in self._adamw.param_groups for key in group["params"]]
        pairs = zip(self._trained.items(), keys, strict=True)
        return [_Flat(key, [(Span(name, 0, p.numel()), 0)]) for (name, p), key in pairs]

    def _fragments(self) -> list[_Flat]:
        flats = [_Flat(key, []) for group in self._adamw.param_groups for key in group["params"]]
        for name, parameter in self._trained.items():
            if (own := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                span = Span(name, own.lp_fragment_address.start, own.lp_fragment_address.numel)
                flats[own.param_group_index].spans.append((span, own.hp_fragment_address.start))
        return flats

    def _shares(self) -> list[_Flat]:
        flats = [_Flat(key, []) for key in self._wrapper.fp32_partitioned_groups_flat]
        for name, parameter in self._trained.items():
            own: Any = parameter
            group, at, share = self._wrapper.grad_position[self._wrapper.get_param_id(own)]
            start = self._wrapper._get_param_partition_rank(own) * share
            if (length := min(share, own.ds_numel - start)) > 0:  # the last shares are padded
                flats[group].spans.append((Span(name, start, length), at))
        return flats

    @contextmanager
    def _in_memory(self, index: int, changes: bool) -> Iterator[None]:
        """Have a flat tensor and its moments in memory: under NVMe offload they are on a disk."""
        swapped = self._stage == 3 and self._wrapper._swappable_optimizer_subgroup(index)
        if swapped:
            self._wrapper._optimizer_states_and_gradient_swap_in(index)
        yield
        if swapped and changes:
            self._wrapper._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            self._wrapper._release_swap_buffers(index)


def _new_state(key: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor that it has not moved yet, in the form of its fused kernel."""
    moments = {kind: torch.zeros_like(key, requires_grad=False) for kind in MOMENTS}
    return {"step": torch.zeros((), dtype=torch.float32, device=key.device), **moments}


def _flattened(key: Tensor, state: Mapping[str, Tensor], kind: str) -> Tensor:
    return (key if kind == MASTER else state[kind]).detach().view(-1)


def host_copy(state: TrainedState) -> list[Piece]:
    """This rank's pieces, copied to the host's memory: what happens to the state from now on leaves them alone."""
    copies: list[Piece] = []
    missing = len(KINDS) * sum(span.length for span in state.spans())
    room, on_device = torch.empty(0), False
    for piece in state.pieces():
        values = {}
        for kind, value in piece.values.items():
            if value.numel() > room.numel():
                pinned = value.device.type != "cpu"  # where a GPU copies into it
                elements = max(min(ROOM, missing), value.numel())
                room, on_device = torch.empty(elements, dtype=torch.float32, pin_memory=pinned), on_device or pinned
            own, room = room.tensor_split([value.numel()])
            values[kind] = own.copy_(value, non_blocking=True)
            missing -= value.numel()
        copies.append(Piece(piece.span, piece.step, values))
    if on_device:
        torch.accelerator.synchronize()
    return copies


def release_copies() -> None:
    """Give the memory of written copies back to the host.

    torch keeps pinned memory, and the next save would see it as memory in use, without room for a copy. Older torch
    cannot give it back.
    """
    if torch.accelerator.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
