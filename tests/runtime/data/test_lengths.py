"""Lengths are estimated from sizes alone, well enough to sort by, for each family; from bytes where sizes lack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import KINDS, MORE_KINDS, png, turn

from data_prep.shards import FORMAT, ShardFolder, write_manifest, write_shard
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.data.lengths import PROBE, LengthModel, Lengths, Probed, feature_count, fit, fit_lengths
from pipeline.runtime.ranks import Ranks
from pipeline.vlm.image_size import PixelLimits
from pipeline.vlm.processing import ChatEncoder, load_processor


def write_mixed(folder: Path, count: int) -> ShardFolder:
    """Chats of 1 to 120 characters with no, one or two pictures of 28 x 28 to 140 x 84 pixels."""
    draw = np.random.default_rng(0)
    samples = []
    for index in range(count):
        sides = [(28 * int(draw.integers(1, 6)), 28 * int(draw.integers(1, 4))) for _ in range(index % 3)]
        pictures = [png(size=size, seed=index) for size in sides]
        messages = [
            turn("user", *["<image>"] * len(pictures), "q" * int(draw.integers(1, 80))),
            turn("assistant", "a" * int(draw.integers(1, 40))),
        ]
        record = {"id": f"{index}", "messages": messages, "provenance": {}}
        images = {f"{number}.png": picture for number, picture in enumerate(pictures)}
        samples.append((f"k{index}", {"json": json.dumps(record).encode(), **images}))
    folder.mkdir()
    entry = write_shard(folder / "000000.tar", samples)
    write_manifest(folder, [entry], format=FORMAT, version=1, split="train")
    return ShardFolder(folder)


def true_lengths(dataset: ChatDataset) -> np.ndarray:
    return np.array([dataset.encode(i)["student"].inputs["input_ids"].shape[1] for i in range(len(dataset))])


def estimates(dataset: ChatDataset, model: LengthModel) -> np.ndarray:
    length = Lengths(dataset, model)
    return np.array([length(SampleIndex(index)) for index in range(len(dataset))])


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_estimates_are_near_on_samples_that_were_not_probed(tiny_models, tmp_path, kind):
    encoder = ChatEncoder(load_processor(tiny_models[kind, "student"]), 512)
    dataset = ChatDataset(write_mixed(tmp_path / "data", 150), {"student": encoder})
    model = fit_lengths(dataset, Ranks(), "reinforce")
    true, found = true_lengths(dataset), estimates(dataset, model)
    # Characters are tokens here, and areas nearly so; LLaVA-OneVision's tiles go by the shape of a picture too.
    allowed = 0.08 if kind == "llava_onevision" else 0.04
    assert np.abs(found - true).mean() < allowed * true.mean() and model.error < 1.5 * allowed
    assert np.corrcoef(found, true)[0, 1] > 0.97 and model.nbytes > 0


def test_pixels_are_those_that_the_processor_scales_to(tiny_models, tmp_path):
    """Without the limits the largest pictures would count for more tokens than they give."""
    folder = write_mixed(tmp_path / "data", 150)
    for limits in (PixelLimits(largest=60 * 60), PixelLimits(smallest=100 * 100, largest=120 * 120)):
        encoder = ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), 512, limits)
        dataset = ChatDataset(folder, {"student": encoder})
        true = true_lengths(dataset)
        found = estimates(dataset, fit_lengths(dataset, Ranks(), "reinforce"))
        assert np.abs(found - true).mean() < 0.05 * true.mean()


def test_a_folder_without_sizes_goes_by_bytes(tiny_models, tmp_path):
    """Near for chats of text alone; of a picture bytes say little, for tokens go by its area."""
    folder = tmp_path / "data"
    folder.mkdir()
    samples = []
    for index in range(40):
        messages = [turn("user", "q" * 97 * index), turn("assistant", "a")]
        samples.append((f"k{index}", {"json": json.dumps({"messages": messages}).encode()}))
    entry = write_shard(folder / "000000.tar", samples)
    del entry["sizes"]
    write_manifest(folder, [entry], format=FORMAT, version=1, split="train")
    encoder = ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), 4096)
    dataset = ChatDataset(ShardFolder(folder), {"student": encoder})
    model = fit_lengths(dataset, Ranks(), "reinforce")
    assert len(model.weights) == feature_count(dataset.folder) == 2
    assert np.corrcoef(estimates(dataset, model), true_lengths(dataset))[0, 1] > 0.98


def test_estimates_stay_between_one_and_max_length(tiny_models, tmp_path):
    encoder = ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), 60)
    dataset = ChatDataset(write_mixed(tmp_path / "data", 30), {"student": encoder})
    wild = LengthModel((-5.0, 1.0, 0.0, 0.0), 0.0, 0.0, 0.0)
    assert set(estimates(dataset, wild)) <= {1.0, 60.0} and estimates(dataset, wild).min() == 1.0


def test_samples_that_cannot_be_used_are_left_out_of_the_fit(tiny_models, tmp_path):
    encoder = ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), 5)
    dataset = ChatDataset(write_mixed(tmp_path / "data", 30), {"student": encoder})
    model = fit_lengths(dataset, Ranks(), "reinforce")
    assert model.weights == (0.0,) * 4 and set(estimates(dataset, model)) == {1.0}


def test_a_model_survives_its_checkpoint():
    model = fit([Probed((float(n), 0.0, 0.0, 1.0), 3 * n + 7, 100) for n in range(1, 9)], 4)
    assert LengthModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    assert model.weights == pytest.approx((3.0, 0.0, 0.0, 7.0), abs=1e-9) and model.nbytes == 100


def test_the_probe_is_spread_over_the_data_and_shared_by_the_ranks(tiny_models, tmp_path, monkeypatch):
    encoder = ChatEncoder(load_processor(tiny_models["qwen2_vl", "student"]), 512)
    dataset = ChatDataset(write_mixed(tmp_path / "data", 150), {"student": encoder})
    read: list[int] = []
    encode = ChatDataset.encode
    monkeypatch.setattr(ChatDataset, "encode", lambda self, sample: read.append(sample) or encode(self, sample))
    fit_lengths(dataset, Ranks(0, 2), "reinforce")
    first = list(read)
    fit_lengths(dataset, Ranks(0, 1), "reinforce")
    assert len(read) - len(first) == PROBE and len(first) == PROBE // 2 and max(read) > 140
