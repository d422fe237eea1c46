"""A cache of a mapped vocabulary: its map on disk, its records, whom it serves, and one-to-one the shared one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_losses import make_h, make_head
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.cache.find import open_cache
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.mapping import MAP, MAPPED, MAPPING, VOCABULARY, read_map
from pipeline.cache.reader import TeacherCache, mismatches
from pipeline.cache.view import CacheView
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import pack_record, to_numpy, unpack_places, unpack_record
from pipeline.codec.random import uniform
from pipeline.codec.registry import make_codec
from pipeline.errors import CacheError, SampleError
from pipeline.loss.bucket import BucketShare
from pipeline.loss.matching import STRATEGIES
from pipeline.signal import Unembedding
from pipeline.steps.cache.mapped import bucket_summary, check_bucket
from pipeline.steps.interact import Draw, interaction_losses
from pipeline.vocabulary_map import MappedHead, TeacherGroups, VocabularyMap

LAYERS, THEIRS, OURS, WIDTH = (2, 4, 6), 50, 40, 8
IDS = VocabularyMap(np.r_[np.arange(30), np.full(20, OURS)].astype(np.int32), OURS)
HEAD = make_head(THEIRS, WIDTH, dtype=torch.float32)
CODECS = {"sampled": {"points": 16, "seed": 0}, "topk": {"k": 6}}


def identity(codec="topk", **fingerprints) -> CacheIdentity:
    prints = {VOCABULARY: MAPPED, MAP: IDS.digest, "student_tokenizer": "abc", **fingerprints}
    return CacheIdentity({"name": codec, **CODECS[codec]}, LAYERS, IDS.size, prints)


def places_of(key: str) -> np.ndarray:
    """Of 7 response tokens some are supervised."""
    return np.r_[np.flatnonzero(uniform(0, "places", key, (0,), 7)[:, 0] < 0.6), 7].astype(np.int64)


def tokens_of(key: str) -> np.ndarray:
    return (uniform(0, "tokens", key, (0,), 7)[:, 0] * OURS).astype(np.int64)


def encode(codec, key: str, tokens: int, head: Unembedding) -> dict[str, np.ndarray]:
    hidden = make_h(tokens, len(LAYERS), WIDTH, dtype=torch.float32, seed=int(key[1:]))
    drawn = torch.from_numpy(uniform(0, "draw", key, LAYERS, tokens))
    return {name: to_numpy(array) for name, array in codec.encode(hidden, head, drawn).items()}


def fill(path, data: ShardFolder, made_of: CacheIdentity, head: Unembedding, mapped: bool) -> CacheFolder:
    folder = CacheFolder(path, made_of, data)
    if mapped:
        folder.save_map(IDS)
    if "order" in folder.missing_files:
        folder.save_order(np.arange(made_of.vocab)[::-1].astype(np.int32))
    for shard in data.shards:
        with folder.writer(shard.name) as writer:
            for key in data.keys[shard.first : shard.first + shard.samples]:
                places = places_of(key) if mapped else None
                tokens = tokens_of(key) if places is None else tokens_of(key)[places[:-1]]
                writer.add(key, tokens, encode(folder.codec(), key, len(tokens), head), places)
            writer.commit()
    assert folder.finish()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ShardFolder:
    return ShardFolder(write_data(tmp_path_factory.mktemp("data") / "train", 6))


@pytest.fixture(scope="module", params=CODECS)
def cache(request, tmp_path_factory, data) -> TeacherCache:
    path = tmp_path_factory.mktemp("mapped") / "cache"
    fill(path, data, identity(request.param), MappedHead.of(HEAD, TeacherGroups(IDS)), mapped=True)
    return TeacherCache(path, data)


def test_records_say_which_response_tokens_they_are_for(cache, data):
    view = CacheView(cache, LAYERS)
    for index, key in enumerate(data.keys):
        record, kept = view.record(index, 0, tokens_of(key))
        assert np.flatnonzero(kept).tolist() == places_of(key)[:-1].tolist()
        assert np.array_equal(record.tokens, tokens_of(key)[kept]) and len(record.arrays) > 1
        half, fewer = CacheView(cache, LAYERS, token_share=0.5).record(index, 0, tokens_of(key))
        assert not (fewer & ~kept).any() and len(half.tokens) == fewer.sum()
    stored = cache.read(0)
    other = tokens_of(data.keys[0])
    other[stored.places[0]] += 1
    with pytest.raises(SampleError, match=f"at response token {stored.places[0]} expected id"):
        view.record(0, 0, other)
    with pytest.raises(SampleError, match="expected 6 tokens, found 7"):
        cache.check_tokens(replace(stored, places=np.r_[0, 7], tokens=other[:1] - (stored.places[0] == 0)), other[:6])


def test_signals_are_over_the_students_ids(cache):
    signal = cache.signal([cache.read(0), cache.read(1)], LAYERS)
    assert int(signal.ids.max()) < OURS and not np.isin(signal.ids[signal.probs > 0].numpy(), IDS.outside).any()
    bucket = torch.zeros_like(signal.tail) if signal.bucket is None else signal.bucket.mass
    torch.testing.assert_close(signal.probs.sum(-1) + signal.tail + bucket, torch.ones_like(bucket))
    assert float((bucket + signal.tail).max()) > 0.1
    nothing = cache.signal([], LAYERS)
    assert len(nothing.ids) == 0 and (nothing.bucket is None) == (signal.bucket is None)


def test_a_sample_of_the_mapped_distribution_is_unbiased():
    """The mean over evenly spaced u of the decoded probabilities: 16 points and 50 values of u leave 1/800."""
    codec = make_codec("sampled", order=np.arange(IDS.size).astype(np.int32), **CODECS["sampled"])
    mapped, hidden = MappedHead.of(HEAD, TeacherGroups(IDS)), make_h(5, 2, WIDTH, dtype=torch.float32)
    p, found, draws = mapped.logits(hidden).double().softmax(-1), torch.zeros(5, 2, IDS.size), 50
    for step in range(draws):
        u = torch.full((5, 2), (step + 0.5) / draws, dtype=torch.float64)
        codes = {name: to_numpy(array) for name, array in codec.encode(hidden, mapped, u).items()}
        signal = IDS.to_student(codec.decode(codec.unpack(codec.pack(codes), 5, 2)))
        found[..., :OURS].scatter_add_(2, signal.ids, signal.probs / draws)
        found[..., OURS] += signal.bucket.mass / draws
        entropy = -torch.xlogy(p, p).sum(-1)
    assert float((found - p).abs().max()) <= 1 / (16 * draws)
    torch.testing.assert_close(-signal.neg_entropy.double(), entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("codec", CODECS)
def test_where_both_tokenizers_are_the_same_the_losses_are_the_shared_ones(tmp_path, data, codec):
    """Same draws, same kept ids, same losses; the sampled codec rounds the entropy to 1/65535 of ln V of either."""
    itself = VocabularyMap(np.arange(THEIRS, dtype=np.int32), THEIRS)
    params = {"name": codec, **CODECS[codec]}
    mapped_head = MappedHead.of(HEAD, TeacherGroups(itself))
    results = {}
    for name, head in (("shared", HEAD), ("mapped", mapped_head)):
        order = {"order": np.arange(head.vocab).astype(np.int32)} if codec == "sampled" else {}
        made = make_codec(**params, **order)
        arrays = made.unpack(made.pack(encode(made, "s7", 9, head)), 9, len(LAYERS))
        signal = made.decode(arrays)
        signal = signal if name == "shared" else itself.to_student(signal)
        student = make_head(THEIRS, 6, dtype=torch.float32, seed=9)
        h = make_h(2, 9, 6, dtype=torch.float32).requires_grad_()
        draw = Draw(STRATEGIES["uniform"], torch.Generator())
        losses = interaction_losses(h, student, signal, torch.zeros(9, dtype=torch.long), draw)
        (gradient,) = torch.autograd.grad(losses["matched"].sum() + losses["last"], h)
        results[name] = (losses["matched"], losses["last"], gradient)
    rounding = 9 * np.log(THEIRS + 1) / 65535 if codec == "sampled" else 0.0
    for shared, mapped in zip(results["shared"][:2], results["mapped"][:2], strict=True):
        torch.testing.assert_close(mapped, shared, atol=rounding + 1e-5, rtol=1e-5)
    torch.testing.assert_close(results["mapped"][2], results["shared"][2], atol=1e-6, rtol=1e-4)


def test_a_cache_serves_recipes_of_its_own_vocabulary_alone(tmp_path, data):
    root = tmp_path / "cache"
    fill(root / "topk-mapped", data, identity(), MappedHead.of(HEAD, TeacherGroups(IDS)), mapped=True)
    codec = {"name": "topk", **CODECS["topk"]}
    wanted = {VOCABULARY: MAPPED, "student_tokenizer": "abc"}
    assert open_cache(root, data, wanted, codec, LAYERS, "R").identity.student_ids == OURS
    with pytest.raises(CacheError, match="vocabulary: expected shared, found mapped"):
        open_cache(root, data, {VOCABULARY: "shared"}, codec, LAYERS, "R")
    with pytest.raises(CacheError, match="student_tokenizer: expected another, found abc"):
        open_cache(root, data, {**wanted, "student_tokenizer": "another"}, codec, LAYERS, "R")
    fill(root / "topk-shared", data, CacheIdentity(codec, LAYERS, THEIRS), HEAD, mapped=False)
    shared = open_cache(root, data, {VOCABULARY: "shared"}, codec, LAYERS, "R")
    assert shared.path.name == "topk-shared" and shared.identity.student_ids == THEIRS
    (mismatch,) = mismatches(shared.identity, {VOCABULARY: MAPPED}, codec)
    assert str(mismatch) == "vocabulary: expected mapped, found shared"
    assert open_cache(root, data, wanted, codec, LAYERS, "R").path.name == "topk-mapped"


def test_a_map_that_is_gone_or_changed_is_found(tmp_path, data):
    folder = fill(tmp_path / "cache", data, identity(), MappedHead.of(HEAD, TeacherGroups(IDS)), mapped=True)
    file, prints = folder.path / MAPPING, folder.identity.fingerprints
    assert np.array_equal(read_map(folder.path, prints, IDS.size, "").class_of, IDS.class_of)
    whole = file.read_bytes()
    for content, said in (
        (whole[::-1], "damaged"),
        (whole[4:], "expected SHA-256"),
        (b"", "damaged"),
        (None, "no mapping"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert folder.missing_files == {"mapping"}
        with pytest.raises(CacheError, match=rf"{said}.*--only-missing"):
            TeacherCache(folder.path, data)


def test_places_are_checked_and_cost_other_readers_nothing():
    places, streams = np.array([0, 3, 300]), {"ids": b"x" * 20}
    record = pack_record(np.array([5, 6]), streams, "this", places)
    tokens, found = unpack_record(record, 100, "this")
    assert tokens.tolist() == [5, 6] and found == streams, "as a record without them"
    assert unpack_places(record, "this").tolist() == places.tolist()
    for bad in ([3, 0, 5], [0, 0, 5], [], [-1, 2, 3]):
        with pytest.raises(ValueError, match="which response tokens"):
            unpack_places(pack_record(np.array([5, 6]), streams, "this", np.array(bad, np.int32)), "this")
    with pytest.raises(ValueError, match="which response tokens"):
        unpack_places(pack_record(np.array([5, 6]), streams, "this"), "this")
    with pytest.raises(ValueError, match="checksum"):
        unpack_places(record, "another")


def test_the_buckets_share_is_refused_above_the_recipes_limit():
    sidecars = [
        {"bucket": BucketShare(10, np.array([1.5, 0.2])).to_json()},
        {"bucket": {"tokens": 30, "mass": [2.5, 0.6]}},
    ]
    summary = bucket_summary(sidecars, 0.1)
    assert summary == {"bucket": {"tokens": 40, "layers": [0.1, pytest.approx(0.02)]}}
    with pytest.raises(CacheError, match=r"all 40 tokens: the bucket has 10.0%, 2.0% .*max_bucket_share=0.11"):
        bucket_summary(sidecars, 0.09)
    check_bucket(BucketShare(0, np.zeros(2)), 0.0, "no token")
