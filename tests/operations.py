"""What torch is asked to do: how many operations, which of them wait for a device, and how many bytes live at once.

A CPU has nothing to wait for, but it is asked the same operations as a GPU. So they can be counted there.
"""

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "unique2", "_unique2"}
"""Operations whose result, or its size, the host reads: of item(), tolist(), bool(), a boolean mask as an index."""


class Operations(TorchDispatchMode):
    """Counts the operations inside a `with` block. Views count too: they are a fixed share of the rest."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.most_bytes = 0
        self._storages = {}

    @property
    def total(self):
        return sum(self.names.values())

    @property
    def waits(self):
        return {name: count for name, count in self.names.items() if name in WAITS}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self._storages.values()))
        return out
