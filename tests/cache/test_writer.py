"""Write a cache: any job, any shard, each shard completely or not at all, and one identity for each folder."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from random_cache import (
    FINGERPRINTS,
    HEAD,
    LAYERS,
    D,
    V,
    encode_record,
    fill,
    finished_cache,
    identity,
    rewrite_sidecar,
    teacher_outputs,
    write_data,
)
from random_teacher import random_order

from data_prep.shards import ShardFolder
from pipeline.cache.layout import missing_shards
from pipeline.cache.reader import TeacherCache
from pipeline.cache.writer import CacheFolder
from pipeline.codec.registry import CODECS
from pipeline.errors import CacheError


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.tar"))}


@pytest.mark.parametrize("codec", CODECS)
def test_shards_mirror_the_data_and_are_deterministic(tmp_path, data, codec):
    one, two = (finished_cache(tmp_path / name, data, codec=codec) for name in ("one", "two"))
    assert contents(one) == contents(two)
    assert ShardFolder(one, format="vlsi-cache", newest=2).keys == data.keys
    assert not list(one.glob("*.partial")) and not list(one.glob(".*"))


def test_the_manifest_sums_up_the_sidecars(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity("sampled", points=16), data)
    fill(folder, data, skip={"k005"})
    assert folder.finish(lambda sidecars: {"shards_seen": len(sidecars)})
    manifest = json.loads((folder.path / "manifest.json").read_text())
    sidecars = [json.loads((folder.path / f"{i:06d}.json").read_text()) for i in range(3)]
    assert manifest["shards"] == sidecars and manifest["shards_seen"] == 3 and manifest["skipped"] == 1
    tokens = [sum(len(teacher_outputs(key)[0]) for key in one["keys"] if key != "k005") for one in sidecars]
    assert [one["tokens"] for one in sidecars] == tokens and manifest["tokens"] == sum(tokens)
    assert manifest["version"] == 2 and manifest["codec"] == {"name": "sampled", "points": 16, "seed": 0}
    assert manifest["fingerprints"].keys() == {*FINGERPRINTS, "data"} and manifest["layers"] == list(LAYERS)


def test_a_writer_checks_keys_shapes_and_completeness(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity("sampled"), data)
    folder.save_order(random_order(V))
    codec = folder.codec()
    with folder.writer("000000.tar") as writer:
        with pytest.raises(ValueError, match="'k000': ranks is .* for .2, 3. tokens and layers"):
            writer.add("k000", np.array([1, 2]), encode_record(codec, "k000", torch.zeros(1, 3, D)))
        with pytest.raises(ValueError, match="'k000': ranks is .* for .0, 3. tokens and layers"):
            writer.add("k000", np.array([], int), {"ranks": np.zeros((0, 3, 64), np.int32)})
        with pytest.raises(ValueError, match="'k004' was added twice or is not in 000000.tar"):
            writer.skip("k004", "foreign")
        with pytest.raises(ValueError, match="4 samples were not added, the first 'k000'"):
            writer.commit()
    assert not list(folder.path.glob("*.tar"))


def _fill_some(path, data, names):
    fill(CacheFolder(path, identity("sampled"), data), data, names)


def test_several_jobs_write_one_cache(tmp_path, data):
    path = tmp_path / "cache"
    parts = (["000000.tar", "000002.tar"], ["000001.tar"])
    jobs = [multiprocessing.get_context("fork").Process(target=_fill_some, args=(path, data, part)) for part in parts]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(TeacherCache(path, data)) == 12
    assert contents(path) == contents(finished_cache(tmp_path / "alone", data, codec="sampled"))


def test_a_job_stops_if_the_order_changes(tmp_path, data):
    """The shards already written would decode to other ids."""
    folder = CacheFolder(tmp_path / "cache", identity("sampled"), data)
    fill(folder, data, ["000000.tar"])
    order, made_for = folder.codec().order, folder.made_for
    np.ascontiguousarray(order[::-1]).tofile(folder.path / "order.int32")
    assert np.array_equal(folder.codec().order, order) and folder.made_for == made_for
    with pytest.raises(CacheError) as caught:
        fill(folder, data, ["000001.tar"])
    found = folder.identity.made_for(folder.path)
    assert str(caught.value) == (
        f"{folder.path / 'order.int32'}, the order of the vocabulary, changed while this job used the old one: "
        f"expected a cache made for {made_for}, found {found}. Run again: "
        "deepspeed launch/cache.py --recipe R --only-missing"
    )
    assert [file.name for file in folder.path.glob("*.tar")] == ["000000.tar"]
    again = CacheFolder(folder.path, identity("sampled"), data)
    assert fill(again, data) and TeacherCache(again.path, data).codec.order.tolist() == order[::-1].tolist()


def test_finish_writes_the_sidecars_that_it_checked(tmp_path, data, monkeypatch):
    """Another job may rebuild a shard between the check and the manifest."""
    path = finished_cache(tmp_path / "cache", data)

    def check(*arguments, **options):
        missing = missing_shards(*arguments, **options)
        (path / "000001.json").unlink()
        return missing

    monkeypatch.setattr("pipeline.cache.writer.missing_shards", check)
    assert CacheFolder(path, identity(), data).finish()
    assert len(json.loads((path / "manifest.json").read_text())["shards"]) == 3


def test_only_missing_shards_are_made_again(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    before = contents(path)
    (path / "000001.tar").unlink()
    (path / "000002.json").write_text('{"name": "0000')  # a truncated sidecar
    folder = CacheFolder(path, identity(), data)
    assert folder.missing() == {"000001.tar": "the file is gone", "000002.tar": "not made yet"}
    assert folder.missing(["000000.tar", "000001.tar"]) == {"000001.tar": "the file is gone"}
    assert fill(folder, data) and not folder.missing(verify=True)
    assert contents(path) == before


def test_a_sidecar_that_does_not_fit_its_shard_is_found(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    rewrite_sidecar(path / "000000.json", keys=["k000", "k001", "k002", "k999"])
    rewrite_sidecar(path / "000001.json", bytes=1)
    rewrite_sidecar(path / "000002.json", made_for="x")
    folder = CacheFolder(path, identity(), data)
    reasons = folder.missing()
    assert reasons["000000.tar"] == "its keys are not the data's"
    assert reasons["000001.tar"].startswith("cut off or changed: expected 1 bytes, found ")
    assert reasons["000002.tar"] == "made for another cache"
    (path / "000002.json").write_text("{}")
    rewrite_sidecar(path / "000002.json", made_for=folder.identity.made_for(path))
    assert folder.missing()["000002.tar"] == "its sidecar is damaged (KeyError('data_sha256'))"


def test_a_flipped_bit_in_a_sidecar_is_found_and_its_shard_made_again(tmp_path, data):
    """In any place. In an offset it would make all reads fail; in data_sha256 it would start another cache."""
    path = finished_cache(tmp_path / "cache", data)
    folder, sidecar, before = CacheFolder(path, identity(), data), path / "000001.json", contents(path)
    whole = sidecar.read_bytes()
    for place in range(0, len(whole), 5):
        sidecar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert list(folder.missing()) == ["000001.tar"]
    assert fill(folder, data) and contents(path) == before and sidecar.read_bytes() == whole


def test_a_killed_writer_leaves_no_shard(tmp_path, data):
    folder = CacheFolder(tmp_path / "cache", identity(), data)
    fill(folder, data, ["000000.tar"])
    with pytest.raises(KeyboardInterrupt), folder.writer("000001.tar") as writer:
        writer.skip("k004", "x")
        raise KeyboardInterrupt
    assert sorted(file.name for file in folder.path.iterdir()) == ["000000.json", "000000.tar", "cache.json"]
    assert list(folder.missing()) == ["000001.tar", "000002.tar"]


def test_an_existing_shard_stays_until_the_new_one_is_complete(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    folder, before = CacheFolder(path, identity(), data), contents(path)
    with pytest.raises(ValueError, match="samples were not added"), folder.writer("000001.tar") as writer:
        writer.commit()
    assert not folder.missing(verify=True) and contents(path) == before


def test_a_flipped_bit_is_found_by_verify_and_made_again(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data)
    before = contents(path)
    flipped = bytearray(before["000001.tar"])
    flipped[700] ^= 4
    (path / "000001.tar").write_bytes(flipped)
    folder = CacheFolder(path, identity(), data)
    assert not folder.missing()
    (name, why), *others = folder.missing(verify=True).items()
    assert name == "000001.tar" and why.startswith("changed: expected SHA-256 ") and not others
    with folder.writer(name):  # creating a writer alone changes nothing
        pass
    assert fill(folder, data, [name]) and contents(path) == before


def test_head_and_order_must_be_saved_before_the_shards(tmp_path, data):
    for codec, missing_files in (("hidden", {"head"}), ("sampled", {"order"}), ("topk", set())):
        folder = CacheFolder(tmp_path / codec, identity(codec), data)
        assert folder.missing_files == missing_files
        if missing_files:
            with pytest.raises(ValueError, match=f"save {missing_files} before finish, for codec .*'{codec}'"):
                folder.finish()
    with pytest.raises(CacheError, match=r"no order.int32, the order of the vocabulary.*--recipe R --only-missing"):
        CacheFolder(tmp_path / "sampled", identity("sampled"), data).writer("000000.tar")
    CacheFolder(tmp_path / "hidden", identity("hidden"), data).save_head(HEAD)
    assert not CacheFolder(tmp_path / "hidden", identity("hidden"), data).missing_files


def test_a_damaged_head_counts_as_missing_until_it_is_written_again(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data, codec="hidden")
    head, sha256 = path / "head.safetensors", json.loads((path / "manifest.json").read_text())["head_sha256"]
    whole = head.read_bytes()
    folder = CacheFolder(path, identity("hidden"), data)
    for file in (head, path / "head.json"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        assert folder.missing_files == {"head"}
        with pytest.raises(ValueError, match="save {'head'} before finish"):
            folder.finish()
        assert fill(folder, data) and not folder.missing_files and head.read_bytes() == whole
    assert json.loads((path / "manifest.json").read_text())["head_sha256"] == sha256
    assert torch.equal(TeacherCache(path, data).unembedding().weight, HEAD.weight[:V])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"k": 7}, "codec"),
        ({"codec": "sampled", "points": 32}, "codec"),
        ({"layers": (1, 4, 6)}, "layers"),
        ({"fingerprints": {**FINGERPRINTS, "verbalizers": "zz"}}, "verbalizers"),
        ({"fingerprints": {**FINGERPRINTS, "processor": "zz"}}, "processor"),
        ({"fingerprints": {"weights": "aa"}}, "verbalizers, tokenizer, chat_template"),
    ],
)
def test_caches_of_different_identity_never_mix(tmp_path, data, change, names):
    path = finished_cache(tmp_path / "cache", data)
    with pytest.raises(CacheError) as caught:
        CacheFolder(path, identity(**change), data)
    message = str(caught.value)
    assert f"{path} was made from something else ({names})" in message and "expected" in message
    assert message.endswith("or make a new one beside it: deepspeed launch/cache.py --recipe R")


def test_the_seed_of_the_draw_is_part_of_the_identity(tmp_path, data):
    path = finished_cache(tmp_path / "cache", data, codec="sampled", seed=1)
    with pytest.raises(CacheError, match=r'codec: expected .*"seed": 2.*, found .*"seed": 1'):
        CacheFolder(path, identity("sampled", seed=2), data)
