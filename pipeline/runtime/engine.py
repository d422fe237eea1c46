"""DeepSpeed, and nothing else: the only file that imports it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from pipeline.recipe.schema import Cache, Recipe, Training
from pipeline.runtime.checkpoint.trained_state import TrainedState
from pipeline.runtime.clipping import clip_factors, part_norms
from pipeline.runtime.deepspeed_config import step_config, zero_stage
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.assemble import dtype_of
from pipeline.vlm.structure import read_uncalled
from pipeline.vlm.verb_ffns import Add, AddTo, Fill, whole_beside


def start(verbose: bool = False, limit_minutes: float = 10.0) -> Ranks:
    """Join the other ranks of this job, which must come within DeepSpeed's 10 minutes. limit_minutes: of a collective.

    It must be more than what the watch needs (watch.limit_minutes): NCCL aborts its process where a collective takes
    longer, and nobody would read which rank stood still.
    """
    if get_accelerator().device_name() == "cpu":
        _skip_shared_memory_kernel()
    _share_node_groups()
    if not verbose:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Under mpirun each rank asks MPI for its place, and DeepSpeed would overwrite a port that the user chose.
    port = int(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT))
    deepspeed.init_distributed(distributed_port=port, verbose=verbose)
    _limit_collectives(timedelta(minutes=limit_minutes))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = get_accelerator().device_name(local) if get_accelerator().device_name() != "cpu" else "cpu"
    if device != "cpu":
        get_accelerator().set_device(local)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # long sums of the heads' products
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def stop() -> None:
    """Wait for all ranks, then close the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def sharded_loading(recipe: Recipe, section: Training | Cache) -> Iterator[AddTo]:
    """Where the step's config has ZeRO-3, from_pretrained in this block shards each weight as it arrives.

    No rank then holds a whole model. section: the step's section of the recipe. Yields what adds modules to a model
    that was loaded here: sharded as they are made, or whole if the model is.
    """
    config = step_config(recipe, section, clip=0.0)
    if zero_stage(config) != 3:
        yield whole_beside
        return
    keep_alive = HfDeepSpeedConfig(config)  # transformers holds it by a weak reference
    try:
        yield _sharded_beside
    finally:
        del keep_alive


class Engine:
    """A module under DeepSpeed, with exact global averages and one optimizer."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        section: Training | Cache,
        ranks: Ranks,
        clipped_apart: Sequence[nn.Module] = (),
    ):
        """section: the step's section of the recipe; recipe.cache makes an engine for forwards, without an optimizer.

        clipped_apart: parts that have nothing to do with one another. The gradient of each is clipped by its own norm,
        so that each trains as it would alone. They must hold all that trains. Left out: one norm for the whole.
        """
        self.ranks = ranks
        self.dtype = dtype_of(recipe)
        training = section if isinstance(section, Training) else None
        trained = self._trained = [p for p in module.parameters() if p.requires_grad] if training else []
        self._parts = [[p for p in part.parameters() if p.requires_grad] for part in clipped_apart]
        self._norm_of_parts: float | None = None
        self._clip = training.clip if training else 0.0
        config = step_config(recipe, section, clip=0.0 if self._parts else self._clip)
        self.stage = zero_stage(config)
        if self.stage == 3:
            for part, weight in read_uncalled(module):
                deepspeed.zero.register_external_parameter(part, weight)
        optimizer = None
        if training:
            # Fused: the usual form makes several tensors of the size of all that this rank trains, in every update.
            optimizer = torch.optim.AdamW(
                trained, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
            )
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module, config=config, optimizer=optimizer, model_parameters=trained or None
            )

    @property
    def module(self) -> Any:
        """The module itself."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        return self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, its weights gathered as it goes."""
        return self._engine(*args, **kwargs)

    def train(self) -> None:
        """Switch to training mode, but for frozen parts: there dropout would be noise, and BatchNorm would move.

        Models from from_pretrained are in eval mode, where gradient checkpointing does nothing. So layers that are run
        again stay in training mode themselves: below a frozen decoder something may train, such as the projector.
        """
        self._engine.train()
        for _, frozen in _frozen_parts(self.module):
            for part in frozen.modules():
                part.training = part.training and getattr(part, "gradient_checkpointing", False)

    def eval(self) -> None:
        """Switch to eval mode."""
        self._engine.eval()

    def backward(self, local_sum: Tensor, global_count: int, last: bool = True) -> None:
        """Gradient of (sum of local_sum over ranks and micro-steps) / global_count: never a mean of means.

        last: whether it is the update's last micro-step. Updates may differ in their number of micro-steps, so
        DeepSpeed, told of one, is told each time. It divides by ranks, which are multiplied in beforehand.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(local_sum * (self.ranks.world / max(1, global_count)))

    def step(self, learning_rate: float, discard: bool = False) -> bool:
        """End an update, after the backward of its last micro-step: the optimizer moves with this learning rate.

        Returns whether it did, alike on all ranks. It does not where the norm of a gradient is not finite, or where
        `discard` says so: weights and optimizer states stay as they are, and the gradient is gone.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if discard or not self._clip_parts():
            self._discard()
            return False
        self._engine.step()
        return self.stage == 0 or not self._engine.optimizer.overflow

    def gradient_norm(self) -> float | None:
        """Norm of the whole gradient before clipping, at the last update; None under ZeRO-0, which does not tell."""
        norm = self._norm_of_parts if self._parts else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _discard(self) -> None:
        """End an update without a step. ZeRO does so where the gradient's norm is not finite, so it is told such a one.

        (A gradient of NaN would not do: it would stay in ZeRO-3's buffers, where shards are padded.)
        """
        if self.stage == 0:
            self._engine.zero_grad()
            return
        optimizer, norm = self._engine.optimizer, torch.full((), torch.inf, device=self.device)
        value: Any
        name, value = ("_get_norm_groups", [norm]) if self.stage == 3 else ("scaled_global_norm", norm)
        if hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bfloat16 has an optimizer of its own
            name, value = "get_grads_for_norm", ([norm], {})
        with _instead(optimizer, name, lambda *_, **__: value):
            self._engine.step()
        if not optimizer.overflow:
            raise RuntimeError(f"DeepSpeed took a step that was to be discarded: {type(optimizer).__name__}.{name}")

    def _clip_parts(self) -> bool:
        """Clip each part by its own norm. DeepSpeed knows only one norm for all, so it is told not to clip.

        Returns whether the norms are finite, as far as they are known here: ZeRO's step looks at the whole's itself.
        """
        parts = self._parts or ([self._trained] if self.stage == 0 else [])
        if not parts:
            return True
        shares = [[_gradient_share(p, self.stage) for p in part] for part in parts]
        norms = part_norms(shares, sharded=self.stage > 0)
        if not norms.isfinite().all():
            return False
        if not self._parts:
            return True
        self._norm_of_parts = float(norms.norm())
        for part, factor in zip(self._parts, clip_factors(norms, self._clip).float(), strict=True):
            for parameter in part:
                _scale_gradient(parameter, factor, self.stage)
        return True

    def trained_state(self) -> TrainedState:
        """What a checkpoint keeps: the trained weights and the optimizer's. Frozen weights are on disk already."""
        return TrainedState(self.module, self._engine.optimizer, self.stage, self.ranks)

    def close(self) -> None:
        """Free what the engine holds: weights, gradients, optimizer states. The module cannot be used any more.

        DeepSpeed's hooks, closures and a global list hold the module and the optimizer, so nothing of them would go
        when the step that made them returns, and the next step would have less memory.
        """
        module, optimizer = self._engine.module, getattr(self._engine, "optimizer", None)
        self._engine.destroy()
        # ZeRO-3 pushes each engine's module on this list of modules in a forward, and never takes it off.
        _drop(parameter_offload.FWD_MODULE_STACK, module)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # the next engine would keep hpZ's copies without asking for it
        for held in (getattr(optimizer, "optimizer", None), optimizer, self._engine):
            if held is not None:
                vars(held).clear()
        self._trained, self._parts = [], []
        for parameter in module.parameters():
            _empty(parameter)
        gc.collect()
        get_accelerator().empty_cache()

    def gathered(self, part: nn.Module) -> dict[str, Tensor]:
        """A part's state as whole CPU tensors on rank 0, one gathered at a time; empty elsewhere. All ranks call."""
        whole: dict[str, Tensor] = {}
        for name, parameter in part.named_parameters():
            with _whole(parameter):
                if self.ranks.first:
                    whole[name] = parameter.detach().cpu().clone()
        if self.ranks.first:
            kept = part.state_dict().keys()
            whole |= {name: b.detach().cpu() for name, b in part.named_buffers() if name in kept}
        return whole

    def fingerprints(self) -> dict[str, int]:
        """The sum of the bits of what this rank has of each frozen parameter, and of each buffer of a frozen part."""
        frozen: Any = [(name, p) for name, p in self.module.named_parameters() if not p.requires_grad]
        kept = self.module.state_dict().keys()  # others are computed anew: rotary frequencies, masks
        for start, part in _frozen_parts(self.module):
            frozen += [(start + name, buffer) for name, buffer in part.named_buffers() if start + name in kept]
        return {name: _bits(p.ds_tensor if hasattr(p, "ds_tensor") else p.detach()) for name, p in frozen}

    def with_gradient(self) -> set[str]:
        """The trained parameters that have had a gradient other than zero, in the share that this rank updates."""
        pieces = self.trained_state().pieces()
        return {piece.span.name for piece in pieces if piece.values["exp_avg"].any()}


def _frozen_parts(module: nn.Module, start: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(what their names begin with, the largest parts that have parameters of which none trains)."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if any(trains):
        for name, child in module.named_children():
            yield from _frozen_parts(child, f"{start}{name}.")
    elif trains:
        yield start, module


def _bits(values: Tensor) -> int:
    """Eight bytes at a time where they divide so: a CPU sums billions of two-byte numbers for minutes."""
    flat = values.contiguous().view(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    kind = torch.int64 if whole else {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return int(flat.view(kind).sum(dtype=torch.int64))


def _gradient_share(parameter: nn.Parameter, stage: int) -> Tensor:
    """What this rank has of the gradient that the optimizer will take: flat, and empty where it has nothing."""
    if stage == 3:
        return deepspeed.utils.safe_get_local_grad(parameter)
    if stage == 0:
        return parameter.new_empty(0) if parameter.grad is None else parameter.grad.view(-1)
    fragment = parameter._hp_mapping  # type: ignore[attr-defined]
    if fragment is None:
        return parameter.new_empty(0)
    gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)  # type: ignore[attr-defined]
    # In bfloat16, ZeRO-1 keeps the whole gradient on each rank, though each updates only its shard.
    own = fragment.lp_fragment_address
    return gradient[own.start : own.start + own.numel] if gradient.numel() == parameter.numel() else gradient


def _scale_gradient(parameter: nn.Parameter, factor: Tensor, stage: int) -> None:
    share = _gradient_share(parameter, stage)
    if stage == 3:  # the share may be a copy: offloaded gradients are elsewhere
        deepspeed.utils.safe_set_local_grad(parameter, share * factor)
    else:
        share.mul_(factor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what DeepSpeed prints past its logger, such as ZeRO 1 its memory, unless --verbose asked for it."""
    with contextlib.ExitStack() as stack:
        if not logging.getLogger("DeepSpeed").isEnabledFor(logging.WARNING):
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


@contextlib.contextmanager
def _instead(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Let an object have another method meanwhile. Raises AttributeError where it has none of that name."""
    getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def _drop(modules: list[nn.Module], module: nn.Module) -> None:
    modules[:] = [other for other in modules if other is not module]


def _empty(parameter: nn.Parameter) -> None:
    """Give back the memory of a parameter, and of the shards and gradients that DeepSpeed has hung on it."""
    parameter.grad = None
    for tensor in (parameter, *(value for value in vars(parameter).values() if isinstance(value, Tensor))):
        tensor.data = tensor.data.new_empty(0)
    vars(parameter).clear()


def _sharded_beside(model: nn.Module) -> Add:
    """Add modules to a sharded model: rank 0 fills each, and every rank keeps its shard of it. All ranks must call."""
    like: Any = next(parameter for parameter in model.parameters() if hasattr(parameter, "ds_id"))

    def add(module: nn.Module, fill: Fill) -> None:
        if torch.distributed.get_rank() == 0:
            fill()
        # One parameter at a time: to this rank's device, rank 0's values from rank 0, then all but the shard is freed.
        like.convert_to_zero_parameters(param_list=list(module.parameters()))

    return add


def _whole(parameter: nn.Parameter):
    return deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext()


def _share_node_groups() -> None:
    """Let all models of a process use the same groups for hpZ, the ranks of a node.

    DeepSpeed makes them for each model that it shards and refuses to at the second; stage 1 has two.
    """
    made: dict[int, Any] = {}

    def share(size: int) -> None:
        if size not in made:
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
            make(size)
            made[size] = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = made[size]

    make = groups._create_zero_param_parallel_group
    groups._create_zero_param_parallel_group = share


def _limit_collectives(limit: timedelta) -> None:
    """How long a collective may take: of all ranks' group, and of those that DeepSpeed makes later by torch's defaults.

    ZeRO-1 and ZeRO-2 sum gradients in one of them, hpZ gathers weights in others.
    """
    c10d = torch.distributed.distributed_c10d
    c10d._set_pg_timeout(limit)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit


def _skip_shared_memory_kernel() -> None:
    """On a CPU, skip a kernel for collectives that takes 45 s to compile at the first start: gloo does them too."""
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):  # private: without it DeepSpeed merely compiles
        compatible["deepspeed_shm_comm"] = False
