"""What torch is asked to do: how many operations, which of them make the host wait, and how many bytes live at once.

Where a GPU is not at hand, `torch.device("meta")` stands for it: it is asked the same operations as a GPU. Its tensors
have no values, so nothing can be read from them unnoticed.
"""

from __future__ import annotations

import traceback
from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations inside a `with` block, views included."""

    def __init__(self):
        super().__init__()
        self.total = self.most_bytes = 0
        self._storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self._storages.values()))
        return out


class Waits(TorchDispatchMode):
    """Finds where the host waits for the device: reads of a value, and copies between the two that are not queued.

    What is read of a "meta" tensor is 1 everywhere. `places` counts the lines of this project that wait.
    """

    def __init__(self):
        super().__init__()
        self.total, self.places = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        source = next((x for x in args if isinstance(x, torch.Tensor)), None)
        if source is not None and source.is_meta and name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self._wait()
            return 1
        if source is not None and source.is_meta and name == "nonzero":
            self._wait()
            return torch.empty(len(source), source.dim(), dtype=torch.int64, device="meta")
        if name == "_to_copy" and torch.device(kwargs.get("device") or source.device).type != source.device.type:
            if source.is_meta or not kwargs.get("non_blocking"):
                self._wait()
            if source.is_meta:
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)

    def _wait(self):
        ours = [frame for frame in traceback.extract_stack() if "/pipeline/" in frame.filename]
        self.places[f"{ours[-1].filename.rpartition('/')[2]}: {ours[-1].line}"] += 1
