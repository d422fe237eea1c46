"""Read a cache: each sample gets its distributions, and a cache that does not fit is an error."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import webdataset
from random_cache import (
    CACHE_COMMAND,
    FINGERPRINTS,
    HEAD,
    LAYERS,
    V,
    fill,
    finished_cache,
    identity,
    teacher_outputs,
    write_data,
)
from random_teacher import random_order

from data_prep.shards import ShardFolder
from pipeline.cache.reader import TeacherCache
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import unpack_record
from pipeline.codec.registry import CODECS
from pipeline.errors import CacheError, SampleError
from pipeline.loss.sparse_kl import column_kl, kl_matrix
from pipeline.signal import HiddenSignal, Unembedding


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_a_record_holds_the_teachers_distributions(tmp_path, data):
    cache = TeacherCache(finished_cache(tmp_path / "cache", data, k=5), data, FINGERPRINTS, LAYERS)
    assert len(cache) == 12 and cache.manifest["tokens"] == sum(len(teacher_outputs(key)[0]) for key in data.keys)
    records = [cache.read(i) for i in (7, 0)]
    assert [record.key for record in records] == ["k007", "k000"]
    for record in records:
        cache.check_tokens(record, teacher_outputs(record.key)[0])
    hidden = torch.cat([teacher_outputs(key)[1] for key in ("k007", "k000")])
    signal = cache.signal(records, (6, 2))
    truth = HEAD.logits(hidden[:, [2, 0]]).softmax(-1)
    assert signal.ids.shape == (len(hidden), 2, 5)
    torch.testing.assert_close(signal.probs, truth.gather(-1, signal.ids), rtol=4e-3, atol=0)


def test_joined_records_keep_layers_and_tokens_apart(tmp_path, data):
    """Joined records have different lengths and numbers of ids. Each token keeps its own points and entropy."""
    cache = TeacherCache(finished_cache(tmp_path / "cache", data, codec="sampled", points=256), data)
    signal = cache.signal([cache.read(i) for i in (7, 0, 5)], (6, 2))
    hidden = torch.cat([teacher_outputs(key)[1] for key in ("k007", "k000", "k005")])
    truth = HEAD.logits(hidden[:, [2, 0]]).softmax(-1)
    found = torch.zeros_like(truth).scatter_add(-1, signal.ids, signal.probs)
    assert (found - truth).abs().max() < 1 / 256 + 1e-6, "each id has its probability, rounded down or up to a point"
    torch.testing.assert_close(signal.neg_entropy, (truth * truth.log()).sum(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", ["sampled", "hidden"])
def test_a_cache_can_be_pickled_for_workers(tmp_path, data, codec):
    cache = TeacherCache(finished_cache(tmp_path / "cache", data, codec=codec), data)
    copy = pickle.loads(pickle.dumps(cache))
    for name, array in copy.read(4).arrays.items():
        assert np.array_equal(array, cache.read(4).arrays[name])


def test_a_hidden_cache_gives_the_losses_of_a_live_teacher(tmp_path, data):
    """Bit for bit in float32: the hidden states and the head are the same."""
    cache = TeacherCache(finished_cache(tmp_path / "cache", data, codec="hidden", dtype="float32"), data)
    hidden = torch.cat([teacher_outputs(key)[1] for key in data.keys])
    live = HiddenSignal(hidden, HEAD)
    cached = cache.signal([cache.read(i) for i in range(len(cache))], LAYERS, unembedding=cache.unembedding())
    assert torch.equal(cached.hidden, hidden) and torch.equal(cached.unembedding.weight, HEAD.weight[:V])
    student = torch.randn(2, *hidden[:, 0].shape, generator=torch.Generator().manual_seed(9))
    losses = [
        (kl_matrix(student, HEAD, signal, (range(2), range(1, 3))).values, column_kl(student[0], HEAD, signal, 2))
        for signal in (live, cached)
    ]
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def test_the_mean_of_200_draws_gives_the_losses_of_a_live_teacher(tmp_path):
    """The value and gradient of a KL agree within the standard error of 200 draws. Each record is one draw."""
    data = write_data(tmp_path / "data", shards=1, each=200)
    tokens, hidden = teacher_outputs("k005")
    folder = CacheFolder(tmp_path / "cache", identity("sampled", points=16), data)
    assert fill(folder, data, outputs=lambda key, layers: (tokens, hidden))
    cache = TeacherCache(folder.path, data)
    head = Unembedding(HEAD.weight.double(), V, scale=HEAD.scale, softcap=HEAD.softcap)
    student = torch.randn(hidden[:, 0].shape, generator=torch.Generator().manual_seed(9)).double()

    def loss(signal):
        h = student.clone().requires_grad_()
        value = column_kl(h, head, signal, 2)
        value.backward()
        return torch.cat((value.detach().view(1), h.grad.flatten()))

    drawn = torch.stack([loss(cache.signal([cache.read(i)], LAYERS)) for i in range(len(cache))])
    exact = loss(HiddenSignal(hidden.double(), head))
    error = (drawn.mean(0) - exact) / (drawn.std(0) / len(drawn) ** 0.5)
    assert error.abs().max() < 4 and 0.5 < error.square().mean().sqrt() < 1.5
    assert (drawn - exact).norm(dim=1).mean() > 5 * (drawn.mean(0) - exact).norm()


@pytest.mark.parametrize("codec", CODECS)
def test_no_records_give_a_signal_of_no_token(tmp_path, data, codec):
    cache = TeacherCache(finished_cache(tmp_path / "cache", data, codec=codec), data)
    head = cache.unembedding() if codec == "hidden" else None
    empty, some = (cache.signal(records, (4, 2), unembedding=head) for records in ([], [cache.read(0)]))
    name = "hidden" if codec == "hidden" else "tail"
    assert getattr(empty, name).shape == (0, *getattr(some, name).shape[1:])
    assert getattr(empty, name).dtype == getattr(some, name).dtype
    if codec == "hidden":
        with pytest.raises(ValueError, match="pass its unembedding"):
            cache.signal([], (4, 2))


def test_a_skipped_sample_keeps_its_index_and_its_reason(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity("sampled"), data)
    assert fill(folder, data, skip={"k005"})
    cache = TeacherCache(folder.path, data)
    assert cache.read(6).key == "k006" and cache.manifest["skipped"] == 1
    assert cache.manifest["shards"][1]["skipped"] == {"k005": "image is broken"}
    with pytest.raises(SampleError, match="skipped when the teacher cache was made: image is broken"):
        cache.read(5)


def refusal(path, data, **options):
    """The error message of a cache that does not open."""
    with pytest.raises(CacheError) as caught:
        TeacherCache(path, data, recipe="my run.yaml", **options)
    return str(caught.value)


def test_the_error_for_no_cache_has_the_command(tmp_path, data):
    assert refusal(tmp_path / "nope", data) == f"no teacher cache at {tmp_path / 'nope'}; make it: {CACHE_COMMAND}"


def test_the_error_for_an_incomplete_cache_has_its_progress(tmp_path, data):
    fill(CacheFolder(tmp_path / "cache", identity(), data), data, ["000000.tar", "000002.tar"])
    assert refusal(tmp_path / "cache", data) == (
        f"{tmp_path / 'cache'} has 2 of 3 shards, 8 of 12 keys; first missing 'k004' in 000001.tar (not made yet). "
        f"Run: {CACHE_COMMAND} --only-missing"
    )


def test_a_missing_or_damaged_manifest_is_an_error(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    (path / "manifest.json").unlink()
    assert f"{CACHE_COMMAND} --only-missing" in refusal(path, data)
    (path / "manifest.json").write_text("{")
    message = refusal(path, data)
    assert "manifest.json is damaged" in message and f"{CACHE_COMMAND} --only-missing" in message


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_every_fingerprint_is_compared(tmp_path, data, name):
    path = finished_cache(tmp_path / "cache", data)
    message = refusal(path, data, expected={**FINGERPRINTS, name: "something-else"})
    assert message == (
        f"{path} was made from something else ({name}):\n"
        f"  {name}: expected something-else, found {FINGERPRINTS[name]}\n"
        f"Bring back what it was made from, or make a new one beside it: {CACHE_COMMAND}"
    )


def test_a_fingerprint_that_was_not_recorded_is_an_error(tmp_path, data):
    message = refusal(finished_cache(tmp_path / "cache", data), data, expected={"processor": "ee"})
    assert "processor: expected ee, found none recorded" in message


def test_another_codec_is_an_error_with_both(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data, codec="sampled", points=16)
    assert TeacherCache(path, data, codec={"seed": 0, "points": 16, "name": "sampled"}).codec.points == 16
    message = refusal(path, data, codec={"name": "sampled", "points": 64, "seed": 0})
    assert "was made from something else (codec)" in message and message.endswith(CACHE_COMMAND)
    assert (
        'codec: expected {"name": "sampled", "points": 64, "seed": 0}, '
        'found {"name": "sampled", "points": 16, "seed": 0}'
    ) in message


def test_other_data_is_an_error(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    other = write_data(tmp_path / "other", changed={1})
    message = refusal(path, other)
    assert "was made from something else (data)" in message and "000001.tar: made from other data" in message
    assert data.shards[1].sha256 in message and other.shards[1].sha256 in message and message.endswith(CACHE_COMMAND)


def test_more_or_less_data_than_was_cached_is_an_error(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    message = refusal(path, write_data(tmp_path / "more", shards=4))
    assert "has 3 of 4 shards, 12 of 16 keys; first missing 'k012' in 000003.tar (not made yet)" in message
    assert message.endswith(f"{CACHE_COMMAND} --only-missing")
    message = refusal(path, write_data(tmp_path / "fewer", shards=2))
    assert "expected the 2 shards" in message and "found 3 (000002.tar is not in the data)" in message
    assert message.endswith(f"{CACHE_COMMAND} --only-missing")


def test_layers_must_have_been_cached(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    assert TeacherCache(path, data, layers=(6, 2)).columns((6, 2)) == [2, 0]
    assert refusal(path, data, layers=(2, 3, 6)) == (
        f"{path}: asked for teacher layers [2, 3, 6], cached are [2, 4, 6]: [3] missing. Ask for cached ones "
        "(interact.teacher_layers), or have stage 1 verbalize others, in another folder: deepspeed launch/train.py "
        "--stage 1 --recipe 'my run.yaml' --set run=FOLDER 'teacher.layers=[2, 3]'"
    )


def test_other_versions_and_unknown_codecs_are_errors(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    values = json.loads((path / "cache.json").read_text())
    for version in (1, 7):
        (path / "cache.json").write_text(json.dumps({**values, "version": version}))
        message = refusal(path, data)
        assert f"expected cache format version 2, found {version}" in message
        assert message.endswith(f"make it again: mv {path} {path}.old && {CACHE_COMMAND}")
    (path / "cache.json").write_text(json.dumps({**values, "codec": {"name": "tree"}}))
    assert "codec 'tree' is not known here" in refusal(path, data)
    for damaged in ("{", "[]", "{}"):
        (path / "cache.json").write_text(damaged)
        message = refusal(path, data)
        assert "cache.json is damaged" in message and message.endswith(f"mv {path} {path}.old && {CACHE_COMMAND}")


def test_a_truncated_shard_is_found_at_open(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data, codec="sampled")
    shard = path / "000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    message = refusal(path, data)
    assert f"000001.tar (cut off or changed: expected {size:,} bytes, found {size - 512:,})" in message
    assert message.endswith(f"{CACHE_COMMAND} --only-missing")
    shard.unlink()
    assert "first missing 'k004' in 000001.tar (the file is gone)" in refusal(path, data)
    assert fill(CacheFolder(path, identity("sampled"), data), data)
    assert len(TeacherCache(path, data)) == 12


def damaged(cache, index, key):
    """The error message for a damaged record."""
    with pytest.raises(CacheError) as caught:
        cache.read(index)
    message = str(caught.value)
    assert message.startswith(f"{cache.path}: record '{key}' is damaged: ")
    assert message.endswith("Put it right: deepspeed launch/cache.py --recipe R --only-missing")
    assert "data_prep" not in message and ".." not in message, "the hint to data_prep lint is for data shards only"
    return message


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_found_at_read(tmp_path, data, codec):
    path = finished_cache(tmp_path / "cache", data, codec=codec)
    entry = json.loads((path / "000000.json").read_text())
    content = bytearray((path / "000000.tar").read_bytes())
    content[entry["offsets"][1] + 512 + 60] ^= 4  # in the member's content, after its header
    (path / "000000.tar").write_bytes(content)
    cache = TeacherCache(path, data)
    assert cache.read(0).key == "k000" and cache.read(2).key == "k002"
    assert "expected checksum" in damaged(cache, 1, "k001")


def test_a_damaged_tar_header_is_found_at_read(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    content = bytearray((path / "000000.tar").read_bytes())
    content[content.index(b"k002.mp")] ^= 1
    (path / "000000.tar").write_bytes(content)
    assert "k002" in damaged(TeacherCache(path, data), 2, "k002")


def test_a_foreign_shard_is_found_at_open_or_at_read(tmp_path, data):
    """Even if it has the same keys, tokens, sizes and codec, and only the verbalizers or the order differ."""
    path = finished_cache(tmp_path / "cache", data, codec="sampled")
    fingerprints = {**FINGERPRINTS, "verbalizers": "zz"}
    other = finished_cache(tmp_path / "other", data, codec="sampled", fingerprints=fingerprints)
    wider = finished_cache(tmp_path / "wider", data, codec="sampled", points=1024)
    shutil.copy(other / "000001.tar", path)
    cache = TeacherCache(path, data)
    assert cache.read(0).key == "k000"
    assert "changed, or of another cache" in damaged(cache, 4, "k004")
    assert list(CacheFolder(path, identity("sampled"), data).missing(verify=True)) == ["000001.tar"]
    shutil.copy(other / "000001.json", path)
    assert CacheFolder(path, identity("sampled"), data).missing() == {"000001.tar": "made for another cache"}
    shutil.copy(path / "000002.tar", path / "000001.tar")
    assert "found 'k008.mp' in its place" in damaged(TeacherCache(path, data), 4, "k004")
    with open(wider / "000001.tar", "ab") as file:
        file.write(bytes(10_240))
    shutil.copy(wider / "000001.tar", path)
    assert "000001.tar (cut off or changed" in refusal(path, data)


def test_a_missing_or_damaged_head_is_found(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data, codec="hidden")
    head = path / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    with pytest.raises(CacheError, match=r"head.safetensors is damaged: expected SHA-256 .* found .*--only-missing"):
        TeacherCache(path, data).unembedding()
    head.unlink()
    message = refusal(path, data)
    assert "no head.safetensors, which its codec decodes through" in message
    assert message.endswith(f"{CACHE_COMMAND} --only-missing")


def test_a_missing_damaged_or_different_order_is_found_at_open(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data, codec="sampled")
    order = random_order(V)
    order.tofile(path / "order.int32")
    assert len(TeacherCache(path, data)) == 12
    np.ascontiguousarray(order[::-1]).tofile(path / "order.int32")
    message = refusal(path, data)
    assert "has 0 of 3 shards" in message and "(made for another cache)" in message
    assert message.endswith(f"{CACHE_COMMAND} --only-missing")
    order[3] = order[4]
    order.tofile(path / "order.int32")
    assert refusal(path, data) == (
        f"{path / 'order.int32'} is damaged: expected each of {V} ids once. Remove it. "
        f"Put it right: {CACHE_COMMAND} --only-missing"
    )
    (path / "order.int32").unlink()
    assert refusal(path, data) == (
        f"{path}: no order.int32, the order of the vocabulary. Put it right: {CACHE_COMMAND} --only-missing"
    )


def test_a_sample_with_other_tokens_is_rejected(tmp_path, data):
    cache = TeacherCache(finished_cache(tmp_path / "cache", data), data)
    record = cache.read(5)
    tokens = teacher_outputs("k005")[0].tolist()
    with pytest.raises(SampleError, match=rf"at response token 1 expected id 99, found {tokens[1]}.*data.max_length"):
        cache.check_tokens(record, [tokens[0], 99, *tokens[2:]])
    with pytest.raises(SampleError, match="has other response tokens: expected 2 tokens, found 3"):
        cache.check_tokens(record, torch.tensor(tokens[:2]))


def test_a_cache_is_a_shard_folder(tmp_path, data):
    folder = ShardFolder(finished_cache(tmp_path / "cache", data), format="vlsi-cache", newest=2)
    assert folder.keys == data.keys and list(folder.read_members(3)) == ["mp"]


def test_webdataset_reads_a_cache_shard(tmp_path, data):
    cache = TeacherCache(finished_cache(tmp_path / "cache", data, codec="sampled"), data)
    files = [str(cache.path / shard.name) for shard in data.shards]
    samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == data.keys
    made_for = cache.manifest["shards"][0]["made_for"]
    for index, sample in enumerate(samples):
        tokens, streams = unpack_record(sample["mp"], cache.codec.token_bytes(len(LAYERS)), made_for)
        arrays = cache.codec.unpack(streams, len(tokens), len(LAYERS))
        record = cache.read(index)
        assert np.array_equal(tokens, record.tokens)
        assert all(np.array_equal(arrays[name], record.arrays[name]) for name in record.arrays)
