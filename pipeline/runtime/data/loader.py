"""Load batches in worker processes, ahead of the step that uses them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader, get_worker_info

from pipeline.errors import DataError, SampleError
from pipeline.runtime.data.bad_samples import Rejected
from pipeline.runtime.data.batches import ChatDataset, LoadedBatch, SampleIndex, encoded_nbytes, map_unique
from pipeline.runtime.display.progress import size_text
from pipeline.runtime.faults import watch
from pipeline.runtime.faults.stop import leave_signals_to_parent
from pipeline.vlm.processing import Batch, ChatEncoder, Encoded, collate

Sample = TypeVar("Sample")

STALLED_S = 300
"""A loader that gives nothing for so long is stuck. In a rank that is watched it is the watch that finds that."""
SHARED_MEMORY = Path("/dev/shm")
"""Worker processes hand their tensors over through files here, on Linux."""
WAITING_BYTES = 2 * 2**30
"""At most about so many bytes of micro-batches wait in a rank: 8 ranks of a node then take 16 GiB of its memory. An
update of 64 pictures of a megapixel in bfloat16 takes 0.8 GB."""
WINDOW = 32
"""Neighbouring samples whose batches are formed together: enough to find samples of similar length."""
WINDOW_WORKERS = 4
"""Loader workers of a rank that are chosen unasked for windows, at most: each holds up to two, of .4 to 1.2 GB each at
a megapixel an image in bfloat16."""
PROBED = 4
"""Samples by whose bytes those of all are estimated."""


def load(
    dataset: ChatDataset, indices: Iterable[Sequence[SampleIndex]], workers: int, device: str, ahead: int = 2
) -> Iterator[LoadedBatch]:
    """Load micro-batches of the given samples, in order, in worker processes; each worker is up to `ahead` ahead.

    Raises what reading a sample raised (CacheError, RecipeError, DataError), and DataError where workers get stuck.
    """
    return _load(dataset, indices, workers, device, functools.partial(_merge, **_padding(dataset)), ahead)


def load_by_length(
    dataset: ChatDataset, windows: Iterable[Sequence[SampleIndex]], most_tokens: int, workers: int, device: str
) -> Iterator[list[LoadedBatch]]:
    """Load windows of samples, in order. Each window gives batches of samples of similar length, the longest first.

    A batch has at most `most_tokens` tokens of the first encoder, padding included, or is a single longer sample. It
    depends on its window alone. A window without any good sample gives one empty batch, which holds its rejects.
    Each worker is at most one window ahead: a window is many samples, with their images as pixels in memory.
    """
    group = functools.partial(_group, most_tokens=most_tokens, **_padding(dataset))
    return _load(dataset, windows, workers, device, group, ahead=1)


def batches_ahead(update: int, nbytes: float, workers: int, room: float) -> int:
    """Micro-batches that each worker may be ahead: together a whole update and two more.

    An update takes all its micro-batches before its first forward: the next one has to be complete while it computes.
    update: micro-batches of an update. nbytes: of one, on average. room: bytes that those waiting may take; where they
    do not fit there are fewer, but one a worker.
    """
    wanted = -(-(update + 2) // workers)
    affordable = int(room / (nbytes * workers)) if nbytes else wanted
    return max(1, min(wanted, affordable))


def workers_within(room: float, nbytes: float, workers: int) -> int:
    """Of so many workers those of which each may have one batch waiting, at least one; 0 stays 0.

    nbytes: of a batch, on average. room: bytes that those waiting may take.
    """
    return min(workers, max(1, int(room / nbytes))) if nbytes else workers


def typical_nbytes(dataset: ChatDataset, samples: Sequence[int]) -> float:
    """Bytes of a sample's model inputs: the mean over PROBED of these, spread over their sizes on disk.

    0 where none of them can be used. Raises what reading a sample raises but SampleError.
    """
    by_size = sorted(samples, key=dataset.folder.nbytes)
    count, found = min(PROBED, len(by_size)), []
    for number in range(count):
        try:
            found.append(encoded_nbytes(dataset.encode(by_size[(2 * number + 1) * len(by_size) // (2 * count)])))
        except SampleError:
            continue
    return sum(found) / max(1, len(found))


def waiting_room(ranks_here: int) -> float:
    """Bytes that a rank's waiting micro-batches may take: WAITING_BYTES, or its share of half the free shared memory.

    ranks_here: ranks on this machine.
    """
    if not SHARED_MEMORY.is_dir():
        return WAITING_BYTES
    return min(WAITING_BYTES, shutil.disk_usage(SHARED_MEMORY).free / 2 / ranks_here)


def _load(
    dataset: ChatDataset,
    indices: Iterable[Sequence[SampleIndex]],
    workers: int,
    device: str,
    collate: Callable,
    ahead: int,
) -> Iterator:
    loader = DataLoader(
        dataset,
        batch_sampler=indices,  # type: ignore[arg-type]  # any iterable of lists of what ChatDataset takes
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        collate_fn=functools.partial(_collate_or_error, collate),
        pin_memory=device != "cpu",
        worker_init_fn=_begin_worker,
        timeout=max(STALLED_S, watch.limit_s()) if workers else 0,
    )
    try:
        batches = iter(loader)  # starts the workers
    except OSError as error:
        raise DataError(f"no loader worker could be started: {error}; {_shared_memory(workers)}") from error
    return _checked(batches, workers)


def _begin_worker(_worker: int) -> None:
    leave_signals_to_parent()


def _checked(loaded: Iterator[Any], workers: int) -> Iterator[Any]:
    """The loaded batches; raises the error that a worker met, and DataError where a worker died or gives nothing."""
    while True:
        try:
            one = next(loaded, None)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise DataError(
                f"the data loader is stuck or lost a worker process ({str(error).splitlines()[0]}). Perhaps its shared "
                f"memory is full: {_shared_memory(workers)}. Or reading data.train has stalled: look at its file system"
            ) from error
        if one is None:
            return
        if isinstance(one, Exception):
            raise one
        yield one


def _collate_or_error(collate: Callable, samples: list[Any]) -> Any:
    error = next((sample for sample in samples if isinstance(sample, Exception)), None)
    if error is not None:
        return error
    batch = collate(samples)
    worker = get_worker_info()
    return batch if worker is None else _no_room(batch, worker.num_workers) or batch


def _no_room(loaded: LoadedBatch | list[LoadedBatch], workers: int) -> DataError | None:
    """An error where the batch does not fit into what is left of the shared memory: a worker would lose it silently."""
    if not SHARED_MEMORY.is_dir():
        return None
    needed = sum(one.nbytes() for one in (loaded if isinstance(loaded, list) else [loaded]))
    if needed <= shutil.disk_usage(SHARED_MEMORY).free:
        return None
    return DataError(f"a batch of {size_text(needed)} does not fit into shared memory: {_shared_memory(workers)}")


def _shared_memory(workers: int) -> str:
    if not SHARED_MEMORY.is_dir():
        return f"there is no {SHARED_MEMORY} here; data.workers is {workers}, and 0 needs none"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY} has {size_text(usage.free)} free of {size_text(usage.total)}. Enlarge it (containers have "
        "64 MB unless started with --shm-size or --ipc=host), or set data.workers lower: it is "
        f"{workers}, and 0 needs none"
    )


def _padding(dataset: ChatDataset) -> dict[str, Any]:
    """The filler row and the padding id of each encoder."""
    fillers = map_unique(ChatEncoder.filler, dataset.encoders)
    pads = {role: _pad_id(encoder) for role, encoder in dataset.encoders.items()}
    return {"fillers": fillers, "pads": pads}


def _merge(samples: list[Any], fillers: Mapping[str, Encoded], pads: Mapping[str, int]) -> LoadedBatch:
    used = [sample for sample in samples if not isinstance(sample, Rejected)]
    made: dict[int, Batch] = {}
    for role, filler in fillers.items():
        if id(filler) not in made:  # models with one encoder share the batch
            made[id(filler)] = collate([encoded[role] for encoded, _ in used], filler, pads[role])
    batches = {role: made[id(filler)] for role, filler in fillers.items()}
    rejected = [sample for sample in samples if isinstance(sample, Rejected)]
    return LoadedBatch(batches, [extra for _, extra in used], rejected)


def _group(
    samples: list[Any], most_tokens: int, fillers: Mapping[str, Encoded], pads: Mapping[str, int]
) -> list[LoadedBatch]:
    used = [sample for sample in samples if not isinstance(sample, Rejected)]
    batches = by_length(used, _length, most_tokens)
    rejected = [sample for sample in samples if isinstance(sample, Rejected)]
    first, *rest = batches or [[]]
    return [_merge(batch, fillers, pads) for batch in ([*first, *rejected], *rest)]


def by_length(samples: list[Sample], length: Callable[[Sample], float], most_tokens: int) -> list[list[Sample]]:
    """A window's samples as batches of most_tokens at most, padding included, or a single longer one; longest first."""
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=length, reverse=True):
        # The first of a batch is its longest: all others are padded to it.
        if not batches or (len(batches[-1]) + 1) * length(batches[-1][0]) > most_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def _length(sample: tuple[dict[str, Encoded], Any]) -> int:
    return len(next(iter(sample[0].values())).response)


def _pad_id(encoder: ChatEncoder) -> int:
    tokenizer = encoder.processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
