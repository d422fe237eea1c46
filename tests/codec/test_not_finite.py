"""A teacher that overflows: its sample is skipped, and nothing else in the cache changes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from random_cache import D, encode_record, fill, identity, write_data
from random_teacher import V, hidden_and_head, pack_streams, random_order

from pipeline.cache.reader import TeacherCache
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import to_numpy
from pipeline.codec.registry import CODECS, make_codec
from pipeline.codec.vocabulary_order import order_by_use
from pipeline.errors import SampleError
from pipeline.rows import row_states
from pipeline.signal import Unembedding
from pipeline.steps.cache.teacher_pass import encode_batch, token_usage

BAD = (torch.nan, torch.inf, -torch.inf)


def broken(hidden, value, token=1, layer=2):
    """A copy of hidden states [T, J, D] with `value` (not finite) at one place."""
    hidden = hidden.clone()
    hidden[token, layer, 3] = value
    return hidden


def uniform_like(hidden):
    return torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_finds_the_tokens_whose_numbers_are_finite(name, value):
    """Even with this head's soft-cap, which turns an infinite logit into a finite one."""
    hidden, head = hidden_and_head()
    codec = make_codec(name, order=random_order(V))
    codes = {n: to_numpy(a) for n, a in codec.encode(broken(hidden, value), head, uniform_like(hidden)).items()}
    assert codec.finite(codes).tolist() == [token != 1 for token in range(len(hidden))]
    assert codec.finite({n: array[:0] for n, array in codes.items()}).shape == (0,)


@pytest.mark.parametrize("name", ["sampled", "topk"])
def test_codecs_that_compute_logits_find_logits_that_overflow(name):
    hidden, _ = hidden_and_head()
    codec = make_codec(name, order=random_order(V))
    head = Unembedding(torch.full((V, hidden.shape[2]), 1e38), V)
    hidden[1:] /= 1e38
    codes = {n: to_numpy(a) for n, a in codec.encode(hidden, head, uniform_like(hidden)).items()}
    assert codec.finite(codes).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("codec", CODECS)
def test_the_sample_is_skipped_with_a_reason(tmp_path, codec):
    data = write_data(tmp_path / "data", shards=1)
    folder = CacheFolder(tmp_path / "cache", identity(codec), data)
    fill(folder, data, [])
    with folder.writer("000000.tar") as writer:
        with pytest.raises(
            SampleError, match="outputs are not finite at 1 of 2 tokens. .* set precision: fp32$"
        ) as caught:
            hidden = broken(torch.zeros(2, 3, D), torch.nan)
            writer.add("k000", np.array([1, 2]), encode_record(folder.codec(), "k000", hidden))
        writer.skip("k000", str(caught.value))
        for key in ("k001", "k002", "k003"):
            writer.add(key, np.array([1]), encode_record(folder.codec(), key, torch.zeros(1, 3, D)))
        writer.commit()
    assert folder.finish()
    cache = TeacherCache(folder.path, data)
    assert cache.read(1).key == "k001"
    with pytest.raises(SampleError, match="not finite at 1 of 2 tokens"):
        cache.read(0)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", CODECS)
def test_fidelity_measures_only_the_finite_tokens(name, value):
    hidden, head = hidden_and_head()
    codec = make_codec(name, order=random_order(V))
    encode = partial(encode_batch, codec, uniform_like(hidden))
    output = encode(torch.arange(3), 7, broken(hidden, value), head)
    without = encode(torch.tensor([0, 2]), 7, hidden, head).fidelity.read()
    found = output.fidelity.read()
    assert found.tokens == 2 and found.to_json() == without.to_json()
    assert encode(torch.tensor([1]), 7, broken(hidden, value), head).fidelity.read().tokens == 0
    finite = {n: to_numpy(a)[[0, 2, 3, 4]] for n, a in output.codes.items()}
    assert codec.pack(finite).keys() == pack_streams(codec, hidden, head).keys()


@pytest.mark.parametrize("value", BAD)
def test_the_vocabulary_order_counts_only_the_finite_tokens(value):
    hidden, head = hidden_and_head()
    use = token_usage(4, broken(hidden, value), head)
    exact = replace(head, weight=head.weight.double(), bias=head.bias.double())
    dense = exact.scale_and_cap_(exact.products(hidden.double())).softmax(-1)
    dense[1, 2] = 0
    # The probabilities are float32. Their last bits depend on the processor and on the height of a matrix product.
    torch.testing.assert_close(use.float(), dense.sum((0, 1)).float())
    assert order_by_use(use.numpy()).tolist() != list(range(V))


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_rows_are_in_order_of_tokens_then_layers_without_a_copy_of_all_states(chunk, monkeypatch):
    hidden, _ = hidden_and_head()
    by_layer = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not by_layer.is_contiguous()
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    chunks = list(row_states(by_layer, chunk))
    assert all(len(rows) <= chunk for rows in chunks) and torch.equal(torch.cat(chunks), hidden.flatten(0, 1))
    (empty,) = row_states(hidden[:0], chunk)
    assert empty.shape == (0, hidden.shape[2])
