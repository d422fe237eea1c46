"""Keep libraries' chatter from the user; what they warn of stays. Call before deepspeed or transformers is imported."""

from __future__ import annotations

import logging
import os
import warnings

# Libraries that log progress and set-up at INFO, or the same set-up remark once a rank at WARNING.
_TALKATIVE = ("DeepSpeed", "torch.distributed", "transformers", "datasets", "filelock", "accelerate")


def hush(verbose: bool = False) -> None:
    """Silence set-up chatter and FutureWarnings of third-party code; with verbose=True leave everything as it is."""
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
