"""Tokens of a sample before it is loaded: a linear function of its size in the manifest, fitted on a few samples.

tokens = a x characters + b x pixels + c x images + d. Pixels are those that the processor scales an image to, so that
the function is nearly exact for processors that make tokens of areas. Only the cut into micro-batches depends on it:
a wrong estimate costs time or memory, and changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.shards import ShardFolder
from pipeline.errors import SampleError
from pipeline.runtime.data.batches import ChatDataset, SampleIndex, encoded_nbytes
from pipeline.runtime.ranks import Ranks, gather_when_ready, of_first_rank
from pipeline.vlm.processing import ChatEncoder

PROBE = 64
"""Samples that are encoded for the fit, spread evenly over the data and shared out over the ranks."""


@dataclass(frozen=True)
class Probed:
    """What encoding one sample showed."""

    features: tuple[float, ...]
    tokens: int
    nbytes: int
    """Bytes of its model inputs."""


@dataclass(frozen=True)
class LengthModel:
    """What the fit found. Saved with a step's checkpoints: a resumed step cuts the same micro-batches."""

    weights: tuple[float, ...]
    """Tokens for each of a sample's features."""
    nbytes: float
    """Bytes of a sample's model inputs, on average."""
    error: float
    """Mean difference between estimated and true tokens on the probed samples, as a share of the true ones."""
    largest_error: float
    """The largest."""

    def estimate(self, features: Sequence[float]) -> float:
        """Tokens of a sample with these features, as the linear function gives them: they may be fewer than none."""
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LengthModel:
        """The inverse of to_json."""
        return cls(**{**saved, "weights": tuple(saved["weights"])})


class Lengths:
    """Estimated tokens of any sample of a dataset."""

    def __init__(self, dataset: ChatDataset, model: LengthModel):
        self.model = model
        self._folder, self._encoder = dataset.folder, first_encoder(dataset)

    def __call__(self, index: SampleIndex) -> float:
        """At least 1, at most the encoder's max_length."""
        estimate = self.model.estimate(sample_features(self._folder, self._encoder, index.sample))
        return min(max(1.0, estimate), float(self._encoder.max_length))


def fit_lengths(dataset: ChatDataset, ranks: Ranks, name: str) -> LengthModel:
    """Encode PROBE samples, shared out over the ranks, and fit. All ranks must call; all get rank 0's result.

    Raises what reading a sample raises but SampleError: a sample that cannot be used is left out.
    """
    count = min(PROBE, len(dataset))
    own = [number * len(dataset) // count for number in range(ranks.rank, count, ranks.world)]
    what = f"{name}: encoding {count} samples, to estimate the lengths of all"
    probed = gather_when_ready(ranks, what, lambda: probe(dataset, own))
    return of_first_rank(fit(probed, feature_count(dataset.folder)))


def probe(dataset: ChatDataset, samples: Sequence[int]) -> list[Probed]:
    """Encode samples; those that cannot be used are left out."""
    encoder, found = first_encoder(dataset), []
    for sample in samples:
        try:
            encoded = dataset.encode(sample)
        except SampleError:
            continue
        tokens = max(one.inputs["input_ids"].shape[1] for one in encoded.values())
        found.append(Probed(sample_features(dataset.folder, encoder, sample), tokens, encoded_nbytes(encoded)))
    return found


def fit(probed: Sequence[Probed], count: int) -> LengthModel:
    """Least squares over `count` features. Of several best fits (all images of one size, say) that of least weights.

    Without any usable sample all lengths are alike: the step itself says what is wrong with them when it meets them.
    """
    if not probed:
        return LengthModel((0.0,) * count, 0.0, 0.0, 0.0)
    features = np.array([one.features for one in probed], dtype=np.float64)
    tokens = np.array([one.tokens for one in probed], dtype=np.float64)
    scale = np.maximum(features.max(0), 1.0)  # pixels are a million times images
    weights = np.linalg.lstsq(features / scale, tokens, rcond=None)[0] / scale
    errors = np.abs(features @ weights - tokens) / tokens
    nbytes = float(np.mean([one.nbytes for one in probed]))
    return LengthModel(tuple(weights.tolist()), nbytes, float(errors.mean()), float(errors.max()))


def feature_count(folder: ShardFolder) -> int:
    """Features of each sample of a folder; a saved model of another number was fitted before it had sizes."""
    return 4 if folder.has_sizes else 2


def sample_features(folder: ShardFolder, encoder: ChatEncoder, sample: int) -> tuple[float, ...]:
    """(characters, pixels, images, 1); of a folder whose manifest has no sizes (bytes, 1)."""
    if not folder.has_sizes:
        return float(folder.nbytes(sample)), 1.0
    size = folder.size(sample)
    pixels = sum(encoder.pixels.area(width, height) for width, height in size.images)
    return float(size.characters), pixels, float(len(size.images)), 1.0


def first_encoder(dataset: ChatDataset) -> ChatEncoder:
    """The encoder whose limits and pixels count: of two models that differ in them, the first."""
    return next(iter(dataset.encoders.values()))
