"""DeepSpeed, and nothing else: the only file that imports it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from pipeline.recipe.checks import accumulation, load_deepspeed_config
from pipeline.recipe.schema import Recipe, Training
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.verb_ffns import Add, AddTo, Fill, whole_beside


def start(verbose: bool = False) -> Ranks:
    """Join the other ranks of this job."""
    if get_accelerator().device_name() == "cpu":
        _skip_shared_memory_kernel()
    if not verbose:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(verbose=verbose)
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = get_accelerator().device_name(local) if get_accelerator().device_name() != "cpu" else "cpu"
    if device != "cpu":
        get_accelerator().set_device(local)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def stop() -> None:
    """Wait for all ranks, then close the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The number format of weights and activations."""
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


@contextlib.contextmanager
def sharded_loading(recipe: Recipe) -> Iterator[AddTo]:
    """Under ZeRO-3, from_pretrained inside this block partitions each weight as it arrives, never whole on one rank.

    Yields what adds modules to a model that was loaded here: sharded as they are made, or whole if the model is.
    """
    config = load_deepspeed_config(recipe.deepspeed)
    if config.get("zero_optimization", {}).get("stage", 0) != 3:
        yield whole_beside
        return
    filled = _fill(config, recipe, micro=1, gas=1, clip=0.0)
    keep_alive = HfDeepSpeedConfig(filled)  # transformers holds it by a weak reference
    try:
        yield _sharded_beside
    finally:
        del keep_alive


class Engine:
    """A module under DeepSpeed, with exact global averages and one optimizer."""

    def __init__(self, module: nn.Module, recipe: Recipe, training: Training | None, ranks: Ranks):
        """training=None makes an engine for forwards alone, with no optimizer state."""
        self.ranks = ranks
        self.dtype = dtype_of(recipe)
        self.accumulation = accumulation(training, ranks.world) if training else 1
        trained = [p for p in module.parameters() if p.requires_grad] if training else []
        config = _fill(
            load_deepspeed_config(recipe.deepspeed),
            recipe,
            micro=training.micro_batch_size if training else 1,
            gas=self.accumulation,
            clip=training.clip if training else 0.0,
        )
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        if not training and self.stage != 3:
            config["zero_optimization"] = {
                "stage": 0
            }  # stages 1 and 2 shard gradients and optimizer states, which forwards do not have
        optimizer = None
        if training:
            # Fused: the usual form makes several tensors of the size of all that this rank trains, in every update.
            optimizer = torch.optim.AdamW(
                trained, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
            )
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
        """Switch to training mode.

        Models from from_pretrained are in eval mode, where gradient checkpointing does nothing.
        """
        self._engine.train()

    def eval(self) -> None:
        """Switch to eval mode."""
        self._engine.eval()

    def backward(self, local_sum: Tensor, global_count: int) -> None:
        """Gradient of (sum of local_sum over ranks and micro-steps) / global_count: never a mean of means.

        DeepSpeed divides by ranks and micro-steps, so both are multiplied in beforehand.
        """
        self._engine.backward(local_sum * (self.ranks.world * self.accumulation / max(1, global_count)))

    def step(self, learning_rate: float) -> None:
        """End a micro-step; at the last of an update the optimizer moves with this learning rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def gradient_norm(self) -> float | None:
        """Norm of the whole gradient before clipping, at the last update; None under ZeRO-0, which does not tell."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write a checkpoint of the trained weights and the optimizer. Frozen weights are on disk already."""
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Resume from a checkpoint and return the state saved with it."""
        path, state = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load {folder}/{tag}")
        return state

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
        """For each parameter, the sum of this rank's bits: of its float32 master where it trains, else of itself."""
        return {name: _bits(self._local(p)) for name, p in self.module.named_parameters()}

    def _local(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            master = (
                deepspeed.utils.safe_get_local_fp32_param(parameter)
                if self.stage == 3
                else deepspeed.utils.safe_get_full_fp32_param(parameter)
            )
            if master is not None:
                return master.detach()
        return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.detach()


def _bits(values: Tensor) -> int:
    """Eight bytes at a time where they divide so: a CPU sums billions of two-byte numbers for minutes."""
    flat = values.contiguous().view(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    kind = torch.int64 if whole else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return int(flat.view(kind).sum(dtype=torch.int64))


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


def _fill(config: dict[str, Any], recipe: Recipe, micro: int, gas: int, clip: float) -> dict[str, Any]:
    """Put the recipe's numbers where the JSON says "auto" or nothing."""
    return {
        **config,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "steps_per_print": 10**9,
    }


def _skip_shared_memory_kernel() -> None:
    """On a CPU, skip a kernel for collectives that takes 45 s to compile at the first start: gloo does them too."""
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):  # private: without it DeepSpeed merely compiles
        compatible["deepspeed_shm_comm"] = False
