"""Which kernels compute between a head's two matrix products: plain torch, or one fused Triton kernel.

Both give the same numbers within rounding; Triton's saves a GPU memory traffic. It is used after it has passed a check
against plain torch on this device (kernel_check.py). A training job chooses once, for all ranks alike (job.py). A
program that did not choose checks when it first needs a kernel, each process for itself.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.loss.kernel_check import Kernel, difference

VARIABLE = "VLSI_KERNELS"
"""Environment variable that goes before the recipe's `kernels`."""

SETTINGS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Choice:
    """The kernels in use, and why."""

    name: str
    """"torch" or "triton"."""
    reason: str
    failed: bool = False
    """Whether the Triton kernel was there, but did not pass its check. The user should know."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


_agreed: Choice | None = None


def use(choice: Choice | None) -> None:
    """Use these kernels in this process from now on; None: as if none had been chosen."""
    global _agreed
    _agreed = choice


def fused(weight: Tensor) -> bool:
    """Whether the Triton kernel is in use for a head with this weight."""
    if not weight.is_cuda or weight.dtype == torch.float64:
        return False
    return (_agreed or _own_choice(str(weight.device), weight.dtype)).name == "triton"


def setting(recipe: str = "auto") -> tuple[str, str]:
    """What is asked for, and where: in the environment, or else in the recipe. Raises RecipeError for another word."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return recipe, f"kernels: {recipe} in the recipe"
    if value not in SETTINGS:
        raise RecipeError(f"{VARIABLE}={value}: expected one of {', '.join(SETTINGS)}; unset it to go by the recipe")
    return value, f"{VARIABLE}={value} in the environment"


def find(asked: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The kernels that this process can use on a device, in a dtype. asked: one of SETTINGS. Never raises."""
    if asked == "torch":
        return Choice("torch", "as asked for")
    if torch.device(device).type != "cuda":
        return Choice("torch", f"the device is no CUDA GPU, but {device}")
    if find_spec("triton") is None:
        return Choice("torch", "Triton is not installed (pip install triton)")
    return check(_load, device, dtype)


def check(load: Callable[[], Kernel], device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The Triton kernel where it passes the check against plain torch, and plain torch where anything is wrong."""
    try:
        fault = difference(load(), device, dtype)
    except Exception as error:  # whatever Triton, its compiler or the driver raises: plain torch still works
        return Choice("torch", _explained(error), failed=True)
    if fault is not None:
        return Choice("torch", f"the Triton kernel differs from plain torch in {fault}", failed=True)
    return Choice("triton", f"it agrees with plain torch on {device} in {dtype}")


def settle(choices: Sequence[Choice], recipe: str = "auto") -> Choice:
    """One choice for all ranks, from each rank's own: plain torch if one of them needs it.

    Ranks with different kernels would still be correct; but a run's numbers then depend on which rank got a sample.
    Raises RecipeError where the Triton kernel was asked for and a rank cannot use it.
    """
    names = {choice.name for choice in choices}
    if names == {"triton"}:
        return choices[0]
    rank, first = next((rank, choice) for rank, choice in enumerate(choices) if choice.name == "torch")
    failed = first.failed or len(names) > 1
    reason = f"rank {rank}: {first.reason}" if failed and len(choices) > 1 else first.reason
    asked, where = setting(recipe)
    if asked == "triton":
        raise RecipeError(
            f"{where}, but the Triton kernel cannot be used: {reason}. Put that right, or ask for auto or torch: plain "
            "torch computes the same, more slowly"
        )
    return Choice("torch", reason, failed)


@cache
def _own_choice(device: str, dtype: torch.dtype) -> Choice:
    choice = settle([find(setting()[0], device, dtype)])
    if choice.failed:
        warnings.warn(f"kernels: {choice}", RuntimeWarning, stacklevel=2)
    return choice


def _load() -> Kernel:
    from pipeline.loss import softmax_kernel  # imported here, because Triton may not be installed

    return softmax_kernel


def _explained(error: Exception) -> str:
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if isinstance(error, subprocess.CalledProcessError | FileNotFoundError) or "C compiler" in str(error):
        return (
            "Triton compiles while the job runs, and found no C compiler that works on this node. Install gcc and "
            f"Python's headers on every compute node (apt install gcc python3-dev), or set CC to a compiler ({text})"
        )
    return f"the Triton kernel did not run ({text})"
