"""Filter the log messages of libraries; real warnings stay. Call before deepspeed or transformers is imported."""

from __future__ import annotations

import logging
import os
import warnings

# Set-up remarks that libraries make at WARNING, once a rank, about what is meant to be so.
_SETUP_REMARKS = (
    "Setting accelerator to CPU",
    "Setting ds_accelerator to",
    "requires torchvision",
    "falling back to",
    "unknown inputs or outputs type",
    "zero_to_fp32",
)
_NOISY_LOGGERS = ("DeepSpeed", "transformers", "torch.distributed", "datasets", "accelerate")


def filter_logs(verbose: bool = False) -> None:
    """Hide set-up messages and third-party FutureWarnings. With verbose=True nothing is hidden."""
    if verbose:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of the C++ part of torch.distributed: where a rank is gone it warns with a stack, before the error that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in _NOISY_LOGGERS:
        # A filter, not a level: libraries set their own loggers' levels when they are imported.
        logging.getLogger(name).addFilter(_is_real)


def is_filtered() -> bool:
    """Whether this process filters log messages."""
    return _is_real in logging.getLogger(_NOISY_LOGGERS[0]).filters


def _is_real(record: logging.LogRecord) -> bool:
    if record.levelno < logging.WARNING:
        return False
    return record.levelno >= logging.ERROR or not any(r in record.getMessage() for r in _SETUP_REMARKS)
