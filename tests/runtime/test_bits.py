"""What the check after the first updates goes by: a sum of bits that any one of them changes."""

import pytest
import torch

from pipeline.runtime.engine import _bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 65])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_any_one_bit_changes_the_sum(dtype, size, offset):
    values = torch.randn(size + offset, dtype=dtype)[offset:]
    before = _bits(values)
    raw = values.view(torch.uint8)
    for place in (0, len(raw) // 2, len(raw) - 1):
        raw[place] ^= 4
        assert _bits(values) != before
        raw[place] ^= 4
    assert _bits(values) == before


def test_a_tensor_of_many_dimensions_and_none_of_any_size():
    assert _bits(torch.zeros(0)) == 0
    assert _bits(torch.tensor([True, True, False])) == 2, "a buffer may be a mask"
    values = torch.randn(3, 4, 5)
    assert _bits(values.transpose(0, 2)) == _bits(values.transpose(0, 2).contiguous())
