"""The teacher's pass: how often encoding waits for the device, and who keeps a copy of the head."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from operations import Waits
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.codec.registry import make_codec
from pipeline.runtime.data.batches import ChatDataset
from pipeline.runtime.data.loader import WINDOW, typical_nbytes
from pipeline.runtime.node import Share
from pipeline.signal import Unembedding
from pipeline.steps.cache.teacher_pass import TeacherPass, encode_batch, window_workers
from pipeline.vlm.processing import ChatEncoder, load_processor

T, J, D, V = 40, 5, 8, 300


@pytest.mark.parametrize(("name", "arrays"), [("sampled", 2), ("topk", 3), ("hidden", 1)])
def test_a_batch_waits_once_for_each_array_that_its_measured_tokens_need(name, arrays):
    """However many tokens are measured; before, each of them and each copy to the device waited too."""
    codec = make_codec(name, order=np.arange(V, dtype="<i4"))
    hidden, head = torch.empty(T, J, D, device="meta"), Unembedding(torch.empty(V, D, device="meta"), V)
    for measured in (1, 9):
        with Waits() as waits:
            encode_batch(codec, torch.rand(T, J, dtype=torch.float64), torch.arange(measured), 64, hidden, head)
        assert dict(waits.places) == {"packing.py: tensor = tensor.detach().cpu().contiguous()": arrays}


@pytest.mark.parametrize(("windows", "workers"), [(2.5, 2), (9, 4), (0.1, 1)])
def test_no_more_windows_wait_than_there_is_room_for(tiny_models, tmp_path, monkeypatch, windows, workers):
    data = ShardFolder(write_data(tmp_path / "data", 12))
    dataset = ChatDataset(data, {"teacher": ChatEncoder(load_processor(tiny_models["qwen2_vl", "teacher"]), 512)})
    room = windows * WINDOW * typical_nbytes(dataset, range(12))
    monkeypatch.setattr("pipeline.steps.cache.teacher_pass.waiting_room", lambda ranks: room)
    assert window_workers(4, dataset, Share(cores=8, ranks=1)) == workers
    assert window_workers(0, dataset, Share(cores=8, ranks=1)) == 0


@pytest.mark.parametrize("first", [True, False])
def test_only_the_rank_that_writes_the_head_copies_it(first):
    """A node has many ranks, and a head may be 2.5 GB."""
    head = Unembedding(torch.randn(V, D), V - 3, torch.randn(V), 2.0, 5.0)
    teacher_pass = TeacherPass.__new__(TeacherPass)
    teacher_pass.job, teacher_pass.empty_batch = SimpleNamespace(ranks=SimpleNamespace(first=first)), None
    teacher_pass._forward = lambda batch, encode: encode(torch.zeros(0, J, D), head)
    found = teacher_pass.head()
    if not first:
        assert found is None
        return
    assert torch.equal(found.weight, head.weight[: V - 3]) and torch.equal(found.bias, head.bias[: V - 3])
    assert (
        found.weight.data_ptr() != head.weight.data_ptr() and found.weight.untyped_storage().nbytes() == (V - 3) * D * 4
    )
    assert (found.vocab, found.scale, found.softcap) == (V - 3, 2.0, 5.0)
