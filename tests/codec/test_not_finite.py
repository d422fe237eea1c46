"""A teacher that overflows: the sample is skipped, and nothing else of the cache knows of it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from random_cache import D, fill, identity, say, write_data
from random_teacher import V, order_of, packed, speech

from pipeline.cache.reader import TeacherCache
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import to_numpy
from pipeline.codec.registry import CODECS, make_codec
from pipeline.codec.vocabulary_order import order_by_use
from pipeline.errors import SampleError
from pipeline.loss.fidelity import Fidelity
from pipeline.rows import row_states
from pipeline.signal import Unembedding
from pipeline.steps.cache.teacher_pass import encode_batch, token_usage

BAD = (torch.nan, torch.inf, -torch.inf)


def broken(hidden, value, token=1, layer=2):
    """Hidden states with one number that is not finite."""
    hidden = hidden.clone()
    hidden[token, layer, 3] = value
    return hidden


def drawn_for(hidden):
    return torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_says_of_which_tokens_the_numbers_are_finite(name, value):
    """Also behind the soft-cap of this head, which makes a finite logit of an infinite one."""
    hidden, head = speech()
    codec = make_codec(name, order=order_of(V))
    codes = {n: to_numpy(a) for n, a in codec.encode(broken(hidden, value), head, drawn_for(hidden)).items()}
    assert codec.finite(codes).tolist() == [token != 1 for token in range(len(hidden))]
    assert codec.finite({n: array[:0] for n, array in codes.items()}).shape == (0,)


@pytest.mark.parametrize("name", ["sampled", "topk"])
def test_logits_that_overflow_are_found_where_logits_are_made(name):
    hidden, _ = speech()
    codec = make_codec(name, order=order_of(V))
    head = Unembedding(torch.full((V, hidden.shape[2]), 1e38), V)
    hidden[1:] /= 1e38
    codes = {n: to_numpy(a) for n, a in codec.encode(hidden, head, drawn_for(hidden)).items()}
    assert codec.finite(codes).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("codec", CODECS)
def test_its_sample_is_skipped_with_a_reason(tmp_path, codec):
    data = write_data(tmp_path / "data", shards=1)
    folder = CacheFolder(tmp_path / "cache", identity(codec), data)
    fill(folder, data, [])
    with folder.writer("000000.tar") as writer:
        with pytest.raises(SampleError, match="about 1 of 2 tokens is not finite. .* set precision: fp32$") as caught:
            hidden = broken(torch.zeros(2, 3, D), torch.nan)
            writer.add("k000", np.array([1, 2]), say(folder.codec(), "k000", hidden))
        writer.skip("k000", str(caught.value))
        for key in ("k001", "k002", "k003"):
            writer.add(key, np.array([1]), say(folder.codec(), key, torch.zeros(1, 3, D)))
        writer.commit()
    assert folder.finish()
    cache = TeacherCache(folder.path, data)
    assert cache.read(1).key == "k001"
    with pytest.raises(SampleError, match="1 of 2 tokens is not finite"):
        cache.read(0)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", CODECS)
def test_fidelity_is_that_of_the_finite_tokens(name, value):
    hidden, head = speech()
    codec = make_codec(name, order=order_of(V))
    code = partial(encode_batch, codec, drawn_for(hidden))
    output = code(torch.arange(3), 7, broken(hidden, value), head)
    without = code(torch.tensor([0, 2]), 7, hidden, head).fidelity
    assert output.fidelity.tokens == 2 and output.fidelity.to_json() == without.to_json()
    assert isinstance(code(torch.tensor([1]), 7, broken(hidden, value), head).fidelity, Fidelity), "none is measured"
    whole = {n: to_numpy(a)[[0, 2, 3, 4]] for n, a in output.codes.items()}
    assert codec.pack(whole).keys() == packed(codec, hidden, head).keys()


@pytest.mark.parametrize("value", BAD)
def test_the_order_is_by_the_use_of_the_finite_tokens(value):
    hidden, head = speech()
    use = token_usage(4, broken(hidden, value), head)
    exact = replace(head, weight=head.weight.double(), bias=head.bias.double())
    dense = exact.scale_and_cap_(exact.products(hidden.double())).softmax(-1)
    dense[1, 2] = 0
    # The probabilities are float32's, whose last bits differ with the processor and the height of a product.
    torch.testing.assert_close(use.float(), dense.sum((0, 1)).float())
    assert order_by_use(use.numpy()).tolist() != list(range(V))


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_rows_are_tokens_then_layers_and_states_that_come_layer_by_layer_are_not_copied_whole(chunk, monkeypatch):
    hidden, _ = speech()
    by_layer = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not by_layer.is_contiguous()
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    pieces = list(row_states(by_layer, chunk))
    assert all(len(piece) <= chunk for piece in pieces) and torch.equal(torch.cat(pieces), hidden.flatten(0, 1))
    (nothing,) = row_states(hidden[:0], chunk)
    assert nothing.shape == (0, hidden.shape[2])
