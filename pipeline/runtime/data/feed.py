"""A step's data as its loop takes it: the micro-batches of one update after the other, loaded ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, tee
from typing import Any

from pipeline.errors import DataError
from pipeline.recipe.schema import Recipe, Training
from pipeline.runtime.data.batches import ChatDataset, DataOrder, LoadedBatch, SampleIndex, derived_seed, micro_batches
from pipeline.runtime.data.cutting import needs_lengths
from pipeline.runtime.data.lengths import LengthModel, Lengths, feature_count, fit_lengths
from pipeline.runtime.data.loader import batches_ahead, load, typical_nbytes, waiting_room, workers_within
from pipeline.runtime.display.progress import say, size_text
from pipeline.runtime.node import loader_workers, rank_share
from pipeline.runtime.ranks import Ranks

Updates = Iterator[list[list[SampleIndex]]]


class Feed:
    """This rank's micro-batches of a step's remaining updates, in order."""

    def __init__(self, loaded: Iterator[LoadedBatch], planned: Updates, workers: int, lengths: LengthModel | None):
        """planned: the samples of the same micro-batches, update by update."""
        self._loaded, self._planned = loaded, planned
        self.workers, self.lengths = workers, lengths

    def next_update(self) -> list[LoadedBatch]:
        """All micro-batches of the next update. Raises what loading one raised."""
        return [next(self._loaded) for _ in next(self._planned)]

    def state(self) -> dict[str, Any]:
        """For the step's checkpoint: with it, `open_feed` cuts the same micro-batches again."""
        return {} if self.lengths is None else {"lengths": self.lengths.to_json()}


def open_feed(
    recipe: Recipe,
    ranks: Ranks,
    name: str,
    training: Training,
    dataset: ChatDataset,
    updates: tuple[int, int],
    state: Mapping[str, Any],
) -> Feed:
    """The feed of a step for updates first .. last - 1; state: Feed.state of the checkpoint that it goes on from.

    All ranks must call. Raises DataError where the lengths that micro_batch_tokens needs are not known.
    """
    share = rank_share()
    workers = loader_workers(recipe.data.workers, share)
    model = _length_model(ranks, name, training, dataset, state)
    order = DataOrder(len(dataset), derived_seed(recipe.seed, name))
    length = None if model is None else Lengths(dataset, model)
    planned, loading = tee(micro_batches(order, training, length, *updates, ranks))
    if recipe.data.workers is None:
        say(f"{name}: {workers} loader workers a rank, for {share.cores:.3g} cores a rank (data.workers)", ranks.first)
    first, loading = _peek(loading)
    if workers:
        nbytes, room = _micro_batch_nbytes(first, model, dataset), waiting_room(share.ranks)
        workers = _workers_within(room, nbytes, workers, name, ranks)
        ahead = batches_ahead(len(first), nbytes, workers, room)
    else:
        ahead = 0
    loaded = load(dataset, chain.from_iterable(loading), workers, ranks.device, ahead)
    return Feed(loaded, planned, workers, model)


def _micro_batch_nbytes(update: list[list[SampleIndex]], model: LengthModel | None, dataset: ChatDataset) -> float:
    """Bytes of a micro-batch of an update like this one, on average."""
    samples = [index.sample for micro_batch in update for index in micro_batch]
    each = typical_nbytes(dataset, samples) if model is None else model.nbytes
    return each * len(samples) / max(1, len(update))


def _workers_within(room: float, nbytes: float, workers: int, name: str, ranks: Ranks) -> int:
    """As workers_within, and say where there are fewer."""
    fitting = workers_within(room, nbytes, workers)
    if fitting < workers:
        say(
            f"{name}: {fitting} of {workers} loader workers a rank: a micro-batch takes {size_text(nbytes)}, and "
            f"{size_text(room)} may wait. A smaller micro_batch_size or data.max_pixels has room for more",
            ranks.first,
        )
    return fitting


def _length_model(
    ranks: Ranks, name: str, training: Training, dataset: ChatDataset, state: Mapping[str, Any]
) -> LengthModel | None:
    """The checkpoint's model or a new one; None where lengths change nothing."""
    folder = dataset.folder
    if not needs_lengths(training, ranks.world):
        return None
    if not folder.has_sizes and training.micro_batch_tokens is not None:
        raise DataError(
            f"{name}.micro_batch_tokens: {folder.path / 'manifest.json'} does not say how large samples are; it was "
            "made by an older version. Run the same `python -m data_prep shard` command again: it keeps the shards and "
            f"adds the sizes. Or leave it out, and set {name}.micro_batch_size"
        )
    if "lengths" in state:
        model = LengthModel.from_json(state["lengths"])
        if len(model.weights) == feature_count(folder):
            return model
    model = fit_lengths(dataset, ranks, name)
    by = "" if folder.has_sizes else f" from their bytes: {folder.path} has no sizes (docs/data_format.md)"
    say(f"{name}: lengths estimated{by}, off by {model.error:.1%}, at most {model.largest_error:.0%}", ranks.first)
    return model


def _peek(updates: Updates) -> tuple[list[list[SampleIndex]], Updates]:
    """The first update, and all of them."""
    first = next(updates, [])
    return first, chain([first], updates)
