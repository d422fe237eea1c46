"""The data as a plan needs it: how many samples, and how many tokens of each kind a sample has."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from data_prep.schema import DataError
from data_prep.shards import ShardFolder, read_manifest
from data_prep.storage import is_file
from pipeline.errors import RecipeError, SampleError
from pipeline.recipe.schema import STEPS, Recipe
from pipeline.results.plan.lengths import assumed_lengths
from pipeline.runtime.data.lengths import Probed, feature_count, fit, sample_features
from pipeline.vlm.assemble import chat_encoder
from pipeline.vlm.config import read_config
from pipeline.vlm.processing import ChatEncoder

MEASURED_SAMPLES = 256
"""Samples that are encoded to measure the lengths, evenly over the data."""

ASSUMED = 4096
"""Lengths that are drawn where none are measured."""


@dataclass(frozen=True)
class Samples:
    """Mean lengths over all samples, in tokens, and where each number comes from."""

    count: int
    tokens: float
    """All tokens of a sample, image tokens included."""
    response: float
    """Response tokens."""
    image: float
    """Image tokens: what the projector gives to the decoder."""
    images: float
    """Images that they belong to; one where none are counted."""
    longest: int
    """Tokens of the longest sample: measured where all are, else no fewer than the sizes of all let expect; at most
    data.max_length."""
    longest_response: int
    """Response tokens of the sample that has most. Sizes do not tell them: those of samples that are not measured are
    taken to be longer as much as the samples are."""
    pixel_bytes: float
    """Bytes of a sample's pixels as the model gets them, in float32."""
    shards: int
    """Data shards; the cache has as many."""
    lengths: tuple[float, ...]
    """Tokens of some samples, measured or assumed: what padding and waiting depend on."""
    origins: Mapping[str, str]
    """Field -> "data.train", "command line", ... ."""

    def cut(self, limit: int) -> Samples:
        """The same under another data.max_length, which may be shorter."""
        if limit >= self.longest:
            return self
        response = self.longest_response * limit // self.longest
        lengths = tuple(min(length, limit) for length in self.lengths)
        return replace(self, longest=limit, longest_response=response, lengths=lengths)


@dataclass(frozen=True)
class Given:
    """What the command line says of the data; None: not given."""

    samples: int | None = None
    tokens: float | None = None
    response: float | None = None
    image: float | None = None


def describe_samples(
    recipe: Recipe,
    given: Given,
    patches_per_token: float,
    patch_numbers: int,
    most: int = MEASURED_SAMPLES,
    field: str = "data.train",
) -> Samples:
    """The data's numbers: the command line's, else measured on data.train.

    patches_per_token, patch_numbers: of the student's image encoder. most: samples that are measured. field: where the
    recipe names the data, for errors. Raises RecipeError for what neither can tell, and where it cannot be read.
    """
    try:
        found, lengths, origins = _measure(recipe, given, most)
    except DataError as error:
        raise RecipeError(f"{field}: {error}") from None
    values = {"count": given.samples, "tokens": given.tokens, "response": given.response, "image": given.image}
    flags = {"count": "--samples", "tokens": "--tokens-per-sample", "response": "--response-tokens"}
    flags["image"] = "--image-tokens"
    for name, value in values.items():
        if value is not None:
            found[name], origins[name] = value, "command line"
    absent = [flags[name] for name in values if name not in found]
    if absent:
        raise RecipeError(
            f"the lengths of the samples are not known: {recipe.data.train} or the student's tokenizer is not here. "
            f"Give {' '.join(f'{flag} N' for flag in absent)}"
        )
    tokens, response, image = found["tokens"], found["response"], found["image"]
    if response + image > tokens:
        raise RecipeError(
            f"--tokens-per-sample {tokens:g} counts all tokens, but {response:g} response tokens and {image:g} image "
            "tokens are more"
        )
    # Where nothing was measured, the longest sample is what data.max_length lets through, with the mean's shares.
    longest = int(found.get("longest", recipe.data.max_length))
    share = response / tokens
    if not lengths or given.tokens is not None:
        lengths = tuple(assumed_lengths(random.Random(0), ASSUMED, tokens, longest))
        origins["lengths"] = "spread as assumed, log-normal"
    return Samples(
        count=int(found["count"]),
        tokens=tokens,
        response=response,
        image=image,
        images=found.get("images", 1.0),
        longest=longest,
        longest_response=int(found.get("longest_response", longest * share)),
        pixel_bytes=found.get("pixel_bytes", 4 * image * patches_per_token * patch_numbers),
        shards=int(found.get("shards", max(1, found["count"] // 1000))),
        lengths=lengths,
        origins=origins,
    )


def own_samples(
    recipe: Recipe,
    patches_per_token: float,
    patch_numbers: int,
    most: int = MEASURED_SAMPLES,
    steps: Collection[str] = STEPS,
) -> dict[str, Samples]:
    """{step: the numbers of its data} of those steps that train on others than data.train, where they can be measured.

    patches_per_token, patch_numbers, most: as for describe_samples. Raises RecipeError where data cannot be read.
    """
    found = {}
    for step, folder in recipe.own_folders().items():
        if step in steps and is_file(folder / "manifest.json") and (recipe.student.path / "tokenizer.json").is_file():
            with_it = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": folder})})
            found[step] = describe_samples(
                with_it, Given(), patches_per_token, patch_numbers, most, field=f"{step}.train"
            )
    return found


def _measure(recipe: Recipe, given: Given, most: int) -> tuple[dict[str, float], tuple[float, ...], dict[str, str]]:
    """What data.train tells: the number of samples from its manifest, and numbers and lengths of a part of them."""
    folder, student = recipe.data.train, recipe.student.path
    if not is_file(folder / "manifest.json"):
        return {}, (), {}
    manifest = read_manifest(folder)
    found: dict[str, float] = {"count": manifest["samples"], "shards": len(manifest["shards"])}
    if None not in (given.tokens, given.response, given.image) or not (student / "tokenizer.json").is_file():
        return found, (), {"count": f"{folder}/manifest.json"}
    numbers, lengths, longest = _lengths(recipe, folder, most)
    origins = dict.fromkeys(("count", *numbers), f"{most} samples of {folder}")
    if longest:
        origins |= dict.fromkeys(("longest", "longest_response"), longest)
    return found | numbers, lengths, origins


def _lengths(recipe: Recipe, folder: Path, most: int) -> tuple[dict[str, float], tuple[float, ...], str]:
    """Means of a part of the samples, encoded as the student gets them, and the tokens of each; maxima of all.

    The text is where the maxima come from, empty where every sample was encoded.
    """
    data, encoder = ShardFolder(folder), chat_encoder(recipe.student.path, recipe.data)
    count, image_id = min(most, len(data)), getattr(read_config(recipe.student.path), "image_token_id", None)
    columns: dict[str, list[float]] = {name: [] for name in ("tokens", "response", "image", "images", "pixel_bytes")}
    probed = []
    for number in (number * len(data) // count for number in range(count)):
        raw = data.read(number)
        try:
            encoded = encoder(raw.key, raw.record["messages"], raw.images)
        except SampleError:
            continue  # a step would leave it out too
        columns["tokens"].append(encoded.inputs["input_ids"].numel())
        columns["response"].append(int(encoded.response.sum()))
        columns["image"].append(_image_tokens(encoded.inputs, image_id))
        columns["images"].append(len(raw.images))
        columns["pixel_bytes"].append(sum(t.nbytes for t in encoded.inputs.values() if t.is_floating_point()))
        probed.append(Probed(sample_features(data, encoder, number), int(columns["tokens"][-1]), encoded.nbytes()))
    if not columns["tokens"]:
        raise RecipeError(f"none of {count} samples of {folder} can be encoded; see python -m data_prep lint {folder}")
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    longest, response, origin = int(max(columns["tokens"])), max(columns["response"]), ""
    if count < len(data):
        measured = longest
        longest, origin = _longest_of_all(data, encoder, probed)
        response = min(longest, response * longest // measured)
    maxima = {"longest": longest, "longest_response": response}
    return means | maxima, tuple(columns["tokens"]), origin


def _longest_of_all(data: ShardFolder, encoder: ChatEncoder, probed: Sequence[Probed]) -> tuple[int, str]:
    """No fewer tokens than the longest sample has, from those of a part, and where that comes from.

    The largest estimate of a run's own length model, more by its largest error on the part.
    """
    if not data.has_sizes:
        return encoder.max_length, "the longest as long as data.max_length lets it be"
    model = fit(probed, feature_count(data))
    estimates = (model.estimate(sample_features(data, encoder, number)) for number in range(len(data)))
    raised = round(max(estimates) * (1 + model.largest_error), 3)  # a fit that is exact must not add a token
    longest = max(math.ceil(raised), *(one.tokens for one in probed))
    return min(longest, encoder.max_length), f"the longest by the sizes of all, {model.largest_error:.0%} added"


def _image_tokens(inputs: Mapping[str, Tensor], image_id: int | None) -> int:
    """By the tokens' kinds, where the processor tells them, else by the id of the image token (LLaVA)."""
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:
        return int((kinds == 1).sum())
    return int((inputs["input_ids"] == image_id).sum()) if image_id is not None else 0
