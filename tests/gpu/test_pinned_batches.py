"""Batches that loader workers pin and that are copied without waiting arrive whole."""

import pytest
import torch
from tiny import KINDS, write_data, write_vlm

from data_prep.shards import ShardFolder
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.data.loader import load
from pipeline.vlm.processing import ChatEncoder, load_processor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pinned_batch_is_copied_without_waiting_and_whole(device, workers, tmp_path):
    folder = ShardFolder(write_data(tmp_path / "data", 8))
    model = write_vlm(tmp_path / "model", KINDS[0], 3, 32, seed=0)
    chats = ChatDataset(folder, {"student": ChatEncoder(load_processor(model), 512)})
    steps = [[SampleIndex(first + i) for i in range(4)] for first in (0, 4)]
    plain = [loaded.batches["student"] for loaded in load(chats, steps, 0, "cpu")]
    loaded = [loaded.batches["student"] for loaded in load(chats, steps, workers, device)]
    for expected, batch in zip(plain, loaded, strict=True):
        assert all(tensor.is_pinned() == (device == "cuda") for tensor in (*batch.inputs.values(), batch.labels))
        moved = batch.to(device, torch.bfloat16)
        del batch  # its pinned memory may be used again once the copy, which still runs, is over
        assert torch.equal(moved.labels.cpu(), expected.labels)
        assert torch.equal(moved.positions.cpu(), expected.positions)
        for name, values in expected.inputs.items():
            wanted = values.bfloat16() if values.is_floating_point() else values
            assert torch.equal(moved.inputs[name].cpu(), wanted), name
