"""The cache folder: filled shard by shard, read sample by sample, refused whenever it does not fit."""

import json
import multiprocessing
import pickle

import pytest
import torch

from data_prep.shards import ShardFolder, write_manifest, write_shard
from pipeline.errors import CacheError, SampleError
from pipeline.teacher.codec import make_codec
from pipeline.teacher.fill import CacheFolder
from pipeline.teacher.folder import CacheIdentity
from pipeline.teacher.signal import Unembedding
from pipeline.teacher.store import TeacherCache

LAYERS, D, V = (2, 4, 6), 8, 20
MADE_BY = {"weights": "aa", "verbalizers": "bb", "tokenizer": "cc", "chat_template": "dd"}
HEAD = Unembedding(torch.randn(V + 2, D, generator=torch.Generator().manual_seed(0)), V, scale=0.5, softcap=30.0)


def write_data(path, shards=3, each=4, salt=""):
    entries = []
    for shard in range(shards):
        keys = [f"k{shard * each + i:03d}" for i in range(each)]
        samples = [(key, {"json": json.dumps({"id": key + salt}).encode()}) for key in keys]
        entries.append(write_shard(path / f"{shard:06d}.tar", samples))
    write_manifest(path, entries, format="vlsi-shards", version=1, split="train")
    return ShardFolder(path)


def identity(codec="topk", layers=LAYERS, made_by=MADE_BY, **params):
    made = make_codec(codec, **params)
    return CacheIdentity({"name": made.name, **made.params}, layers, V, made_by)


def words(key):
    """A sample's response tokens and hidden states, made from its key."""
    number = int(key[1:])
    generator = torch.Generator().manual_seed(number)
    tokens = torch.arange(number % 3 + 1) + number
    return tokens, torch.randn(len(tokens), len(LAYERS), D, generator=generator)


def fill(folder, names=None, skip=()):
    codec = make_codec(**folder.identity.codec)
    if codec.needs_head:
        folder.save_head(HEAD)
    for name in names or folder.missing():
        with folder.writer(name) as writer:
            for key in reversed(folder._shards[name]["keys"]):
                tokens, hidden = words(key)
                if key in skip:
                    writer.skip(key, "image is broken")
                else:
                    writer.add(key, tokens, codec.encode(hidden, HEAD))
            writer.commit()
    return folder.finish()


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def full(tmp_path, data, **options):
    """A finished cache's path."""
    assert fill(CacheFolder(tmp_path / "cache", identity(**options), data))
    return tmp_path / "cache"


def test_a_record_is_what_the_teacher_said(tmp_path, data):
    cache = TeacherCache(full(tmp_path, data, k=5), data, MADE_BY, LAYERS)
    assert len(cache) == 12 and cache.manifest["tokens"] == sum(len(words(key)[0]) for key in data.keys)
    records = [cache.read(i) for i in (7, 0)]
    assert [record.key for record in records] == ["k007", "k000"]
    tokens, hidden = (torch.cat(parts) for parts in zip(words("k007"), words("k000"), strict=True))
    for record in records:
        cache.check_tokens(record, words(record.key)[0])
    signal = cache.signal(records, (6, 2))
    truth = HEAD.logits(hidden[:, [2, 0]]).softmax(-1)
    assert signal.ids.shape == (len(tokens), 2, 5)
    torch.testing.assert_close(signal.probs, truth.gather(-1, signal.ids), rtol=4e-3, atol=0)


def test_hidden_needs_nothing_but_the_cache(tmp_path, data):
    cache = TeacherCache(full(tmp_path, data, codec="hidden", dtype="float32"), data)
    cache = pickle.loads(pickle.dumps(cache))
    signal = cache.signal([cache.read(4)], (4,), unembedding=cache.unembedding())
    assert torch.equal(signal.hidden, words("k004")[1][:, [1]])
    assert torch.equal(signal.unembedding.logits(signal.hidden), HEAD.logits(signal.hidden))


@pytest.mark.parametrize("codec", ["topk", "hidden"])
def test_no_records_are_a_signal_about_no_token(tmp_path, data, codec):
    cache = TeacherCache(full(tmp_path, data, codec=codec), data)
    head = cache.unembedding() if codec == "hidden" else None
    nothing, some = (cache.signal(records, (4, 2), unembedding=head) for records in ([], [cache.read(0)]))
    name = "hidden" if codec == "hidden" else "tail"
    assert getattr(nothing, name).shape == (0, *getattr(some, name).shape[1:])
    assert getattr(nothing, name).dtype == getattr(some, name).dtype
    if codec == "hidden":
        with pytest.raises(ValueError, match="pass its unembedding"):
            cache.signal([], (4, 2))


def test_shards_mirror_the_data_and_are_the_same_bytes_again(tmp_path, data):
    one, two = (full(tmp_path / name, data) for name in ("one", "two"))
    for shard in data.shards:
        assert (one / shard.name).read_bytes() == (two / shard.name).read_bytes()
    assert ShardFolder(one, format="vlsi-cache").keys == data.keys


def test_a_skipped_sample_keeps_its_place_and_its_reason(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity(), data)
    assert fill(folder, skip={"k005"})
    cache = TeacherCache(folder.path, data)
    assert cache.read(6).key == "k006" and cache.manifest["skipped"] == 1
    assert cache.manifest["shards"][1]["skipped"] == {"k005": "image is broken"}
    with pytest.raises(SampleError, match="skipped when the teacher cache was made: image is broken"):
        cache.read(5)


def test_a_sample_skipped_because_the_teacher_overflowed(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity(), data)
    codec = make_codec("topk", k=2)
    with folder.writer("000000.tar") as writer:
        with pytest.raises(SampleError, match="not a number"):
            writer.add("k000", [1], codec.encode(torch.full((1, 3, D), torch.nan), HEAD))
        with pytest.raises(ValueError, match="'k000': ids is .* for .2, 3. tokens and layers"):
            writer.add("k000", [1, 2], codec.encode(torch.zeros(1, 3, D), HEAD))
        with pytest.raises(ValueError, match="'k004' came twice or is not in 000000.tar"):
            writer.skip("k004", "foreign")
        with pytest.raises(ValueError, match="4 samples have not come, the first 'k000'"):
            writer.commit()
    assert not list(folder.path.glob("*.tar"))


def _fill_some(path, data, names):
    fill(CacheFolder(path, identity(), data), names)


def test_many_jobs_fill_one_cache(tmp_path, data):
    path = tmp_path / "cache"
    parts = (["000000.tar", "000002.tar"], ["000001.tar"])
    jobs = [multiprocessing.get_context("fork").Process(target=_fill_some, args=(path, data, part)) for part in parts]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(TeacherCache(path, data)) == 12


def test_only_what_is_missing_is_made_again(tmp_path, data):
    path = full(tmp_path, data)
    before = {shard.name: (path / shard.name).read_bytes() for shard in data.shards}
    (path / "000001.tar").unlink()
    (path / "000002.json").write_text('{"name": "0000')  # a sidecar cut off
    folder = CacheFolder(path, identity(), data)
    assert folder.missing() == {"000001.tar": "the file is gone", "000002.tar": "not made yet"}
    assert folder.missing(["000000.tar", "000001.tar"]) == {"000001.tar": "the file is gone"}
    assert fill(folder) and not folder.missing(verify=True)
    assert {name: (path / name).read_bytes() for name in before} == before


def test_a_killed_writer_leaves_no_shard(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity(), data)
    fill(folder, ["000000.tar"])
    with pytest.raises(KeyboardInterrupt), folder.writer("000001.tar") as writer:
        writer.skip("k004", "x")
        raise KeyboardInterrupt
    assert sorted(file.name for file in folder.path.iterdir()) == ["000000.json", "000000.tar", "cache.json"]
    assert list(folder.missing()) == ["000001.tar", "000002.tar"]


def refusal(path, data, **options):
    with pytest.raises(CacheError) as caught:
        TeacherCache(path, data, recipe="my run.yaml", **options)
    return str(caught.value)


AGAIN = "deepspeed launch/cache.py --recipe 'my run.yaml'"


def test_no_cache_says_how_to_make_one(tmp_path, data):
    assert refusal(tmp_path / "nope", data) == f"no teacher cache at {tmp_path / 'nope'}; make it: {AGAIN}"


def test_an_incomplete_cache_says_how_far_it_is(tmp_path, data):
    fill(CacheFolder(tmp_path / "cache", identity(), data), ["000000.tar", "000002.tar"])
    assert refusal(tmp_path / "cache", data) == (
        f"{tmp_path / 'cache'} has 2 of 3 shards, 8 of 12 keys; first missing 'k004' in 000001.tar (not made yet). "
        f"Run: {AGAIN} --only-missing"
    )


def test_a_cache_whose_manifest_was_never_written(tmp_path, data):
    path = full(tmp_path, data)
    (path / "manifest.json").unlink()
    assert f"{AGAIN} --only-missing" in refusal(path, data)
    (path / "manifest.json").write_text("{")
    message = refusal(path, data)
    assert "manifest.json is damaged" in message and f"{AGAIN} --only-missing" in message


@pytest.mark.parametrize("name", MADE_BY)
def test_every_fingerprint_is_held(tmp_path, data, name):
    path = full(tmp_path, data)
    message = refusal(path, data, expected={**MADE_BY, name: "something-else"})
    assert f"was made from something else ({name})" in message
    assert f"{name}: expected something-else, found {MADE_BY[name]}" in message
    assert message.endswith(f"mv {path} {path}.old && {AGAIN}")


def test_a_fingerprint_that_was_never_recorded(tmp_path, data):
    message = refusal(full(tmp_path, data), data, expected={"processor": "ee"})
    assert "processor: expected ee, found none recorded" in message


def test_other_data_is_refused(tmp_path, data):
    path = full(tmp_path, data)
    other = write_data(tmp_path / "other", salt="x")
    message = refusal(path, other)
    assert "was made from something else (data)" in message and "000000.tar: made from other data" in message
    assert data.shards[0].sha256 in message and other.shards[0].sha256 in message
    more = write_data(tmp_path / "more", shards=4)
    assert "has 3 of 4 shards, 12 of 16 keys; first missing 'k012' in 000003.tar" in refusal(path, more)
    fewer = write_data(tmp_path / "fewer", shards=2)
    message = refusal(path, fewer)
    assert "expected the 2 shards" in message and "found 3 (000002.tar is not in the data)" in message


def test_layers_must_have_been_cached(tmp_path, data):
    path = full(tmp_path, data)
    assert TeacherCache(path, data, layers=(6, 2)).columns((6, 2)) == [2, 0]
    message = refusal(path, data, layers=(2, 3, 6))
    assert "asked for teacher layers [2, 3, 6], cached are [2, 4, 6]: [3] missing" in message and AGAIN in message


def test_other_versions_and_codecs_are_refused(tmp_path, data):
    path = full(tmp_path, data)
    values = json.loads((path / "cache.json").read_text())
    (path / "cache.json").write_text(json.dumps({**values, "version": 7}))
    message = refusal(path, data)
    assert "expected cache format version 1, found 7" in message and message.endswith(AGAIN)
    (path / "cache.json").write_text(json.dumps({**values, "codec": {"name": "sampled"}}))
    assert "codec 'sampled' is not known here" in refusal(path, data)
    (path / "cache.json").write_text("{")
    assert "cache.json is damaged" in refusal(path, data)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"k": 7}, "codec"),
        ({"layers": (1, 4, 6)}, "layers"),
        ({"made_by": {**MADE_BY, "verbalizers": "zz"}}, "verbalizers"),
        ({"made_by": {**MADE_BY, "processor": "zz"}}, "processor"),
        ({"made_by": {"weights": "aa"}}, "verbalizers, tokenizer, chat_template"),
    ],
)
def test_caches_of_different_making_never_mix(tmp_path, data, change, names):
    path = full(tmp_path, data)
    with pytest.raises(CacheError) as caught:
        CacheFolder(path, identity(**change), data)
    assert f"was made from something else ({names})" in str(caught.value)
    assert f"mv {path} {path}.old && deepspeed launch/cache.py --recipe R" in str(caught.value)


def test_a_truncated_shard_is_found_at_open(tmp_path, data):
    path = full(tmp_path, data)
    shard = path / "000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    message = refusal(path, data)
    assert f"000001.tar (cut off or changed: expected {size:,} bytes, found {size - 512:,})" in message
    assert "--only-missing" in message
    assert fill(CacheFolder(path, identity(), data))
    assert len(TeacherCache(path, data)) == 12


def test_a_flipped_bit_is_found_at_read_and_by_verify(tmp_path, data):
    path = full(tmp_path, data)
    shard = path / "000000.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"k001.logprobs.float16") + 512  # the member's first data byte
    content[place] ^= 4
    shard.write_bytes(content)
    cache = TeacherCache(path, data)
    assert cache.read(0).key == "k000"
    with pytest.raises(CacheError, match=r"record 'k001' is damaged: its checksum.*--recipe R --only-missing"):
        cache.read(1)
    folder = CacheFolder(path, identity(), data)
    assert not folder.missing() and list(folder.missing(verify=True)) == ["000000.tar"]
    with folder.writer("000000.tar"):  # asking for a writer alone changes nothing
        pass
    fill(folder, list(folder.missing(verify=True)))
    assert TeacherCache(path, data).read(1).key == "k001"


def test_a_damaged_tar_header_is_found_at_read(tmp_path, data):
    path = full(tmp_path, data)
    shard = path / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"k002.json")] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=r"record 'k002' is damaged.*--only-missing"):
        TeacherCache(path, data).read(2)


def test_a_lost_or_damaged_head_is_found(tmp_path, data):
    path = full(tmp_path, data, codec="hidden")
    head = path / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    with pytest.raises(CacheError, match=r"head.safetensors is damaged: expected SHA-256 .* found .*--only-missing"):
        TeacherCache(path, data).unembedding()
    head.unlink()
    assert "no head.safetensors, which its codec decodes through" in refusal(path, data)
    with pytest.raises(ValueError, match="save_head comes before finish"):
        CacheFolder(path, identity(codec="hidden"), data).finish()


def test_tokens_that_differ_are_an_error(tmp_path, data):
    cache = TeacherCache(full(tmp_path, data), data)
    record = cache.read(5)
    tokens = words("k005")[0].tolist()
    with pytest.raises(CacheError, match=rf"at response token 1 expected id 99, found {tokens[1]}.*data.max_length"):
        cache.check_tokens(record, [tokens[0], 99, *tokens[2:]])
    with pytest.raises(CacheError, match=r"'k005' was cached for other response tokens: expected 2 tokens, found 3"):
        cache.check_tokens(record, torch.tensor(tokens[:2]))
