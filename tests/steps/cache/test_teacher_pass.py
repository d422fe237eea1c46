"""Encoding a batch of the teacher's states: how often it waits for the device."""

import numpy as np
import pytest
import torch
from operations import Waits

from pipeline.codec.registry import make_codec
from pipeline.signal import Unembedding
from pipeline.steps.cache.teacher_pass import encode_batch

T, J, D, V = 40, 5, 8, 300


@pytest.mark.parametrize(("name", "arrays"), [("sampled", 2), ("topk", 3)])
def test_a_batch_waits_once_for_each_array_that_its_measured_tokens_need(name, arrays):
    """However many tokens are measured; before, each of them and each copy to the device waited too."""
    codec = make_codec(name, order=np.arange(V, dtype="<i4"))
    hidden, head = torch.empty(T, J, D, device="meta"), Unembedding(torch.empty(V, D, device="meta"), V)
    for measured in (1, 9):
        with Waits() as waits:
            encode_batch(codec, torch.rand(T, J, dtype=torch.float64), torch.arange(measured), 64, hidden, head)
        assert dict(waits.places) == {"packing.py: tensor = tensor.detach().cpu().contiguous()": arrays}
