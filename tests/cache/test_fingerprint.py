"""A fingerprint changes when the thing it identifies changes, and only then."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from data_prep.shards import data_fingerprint
from pipeline.cache.fingerprint import Mismatch, compare, model_fingerprints, weights_fingerprint
from pipeline.errors import CacheError


@pytest.fixture(autouse=True)
def hash_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home_cache"))
    return tmp_path / "home_cache" / "vlsi" / "sha256.json"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for part in (1, 2):
        save_file({f"w{part}": torch.arange(4.0) + part}, path / f"model-0000{part}-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (path / "config.json").write_text('{"model_type": "qwen2_vl", "transformers_version": "5.23"}')
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (path / "preprocessor_config.json").write_text('{"max_pixels": 100}')
    return path


def test_real_models_have_all_four(tiny_models):
    teacher = model_fingerprints(tiny_models["qwen2_vl", "teacher"])
    assert set(teacher) == {"weights", "config", "tokenizer", "processor"}
    assert all(len(value) == 64 for value in teacher.values())
    assert teacher == model_fingerprints(tiny_models["qwen2_vl", "teacher"])
    student = model_fingerprints(tiny_models["qwen2_vl", "student"])
    assert [m.name for m in compare(teacher, student)] == ["weights", "config"]


@pytest.mark.parametrize(
    ("file", "content", "changed"),
    [
        ("config.json", '{"model_type": "llava"}', "config"),
        ("tokenizer.json", '{"model": {"vocab": {"b": 0}}}', "tokenizer"),
        ("preprocessor_config.json", '{"max_pixels": 200}', "processor"),
        ("model.safetensors.index.json", "{}", "weights"),
        ("model-00002-of-00002.safetensors", "other", "weights"),
    ],
)
def test_each_change_affects_its_own_fingerprint(folder, file, content, changed):
    before = model_fingerprints(folder)
    (folder / file).write_text(content)
    after = model_fingerprints(folder)
    assert compare(before, after) == [Mismatch(changed, before[changed], after[changed])]


def test_the_saving_library_s_version_and_other_files_change_no_fingerprint(folder):
    before = model_fingerprints(folder)
    (folder / "config.json").write_text('{\n "transformers_version": "5.24", "model_type": "qwen2_vl"}')
    (folder / "README.md").write_text("hello")
    assert model_fingerprints(folder) == before


def test_a_file_is_hashed_once_for_its_path_size_and_mtime(folder, hash_store):
    first = weights_fingerprint(folder)
    assert len(json.loads(hash_store.read_text())) == 3
    file = folder / "model-00001-of-00002.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_fingerprint(folder) == first  # the stored hash is used: size and mtime are the same
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert weights_fingerprint(folder) != first


@pytest.mark.parametrize("damage", ["not json", "[]"])
def test_a_damaged_hash_store_is_ignored(folder, hash_store, damage):
    first = weights_fingerprint(folder)
    hash_store.write_text(damage)
    assert weights_fingerprint(folder) == first


def test_a_hash_store_that_cannot_be_written_costs_only_time(folder, tmp_path, monkeypatch):
    first = weights_fingerprint(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert weights_fingerprint(folder) == first


def test_pickled_weights_are_an_error(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CacheError, match=r"as \*.safetensors, found pytorch_model.bin.*save_pretrained"):
        weights_fingerprint(tmp_path)
    with pytest.raises(CacheError, match="found none"):
        weights_fingerprint(tmp_path / "nowhere")


def test_a_folder_without_tokenizer_is_an_error(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CacheError, match=r"expected a tokenizer \(tokenizer.json\), found none"):
        model_fingerprints(folder)


def test_the_data_fingerprint_depends_on_the_shards_and_their_order():
    shards = [{"name": "000000.tar", "sha256": "aa"}, {"name": "000001.tar", "sha256": "bb"}]
    assert data_fingerprint({"shards": shards, "split": "train"}) == data_fingerprint({"shards": shards})
    assert data_fingerprint({"shards": shards}) != data_fingerprint({"shards": shards[::-1]})
