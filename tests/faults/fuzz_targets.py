"""What reads files that others may have written: each target makes good files, wrong ones, and reads them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import yaml
import zstandard
from mutations import CANARY, damaged, hostile_json, hostile_tars, hostile_yaml, pickles, write
from random_cache import finished_cache
from random_cache import write_data as write_cached_data
from running import tiny_recipe
from tiny import write_data, write_vlm

from data_prep.lint import lint
from data_prep.shards import MANIFEST, UNSIGNED, ShardFolder, describe_shard, write_manifest
from pipeline.cache.fingerprint import model_fingerprints
from pipeline.cache.reader import TeacherCache
from pipeline.codec.packing import pack_record, unpack_record
from pipeline.errors import CacheError
from pipeline.recipe.checks import check_recipe
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.folder import done, read_metrics
from pipeline.vlm.assemble import vocabulary_rows
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import decode_image, load_processor
from pipeline.vlm.verb_ffns import initial_verb_ffns, save_verb_ffns, stored_verb_ffns

BOMB = 2 * 2**30
"""Bytes that a bomb grows to: more than the process may take."""


@dataclass(frozen=True)
class Case:
    """One wrong input."""

    target: str
    what: str
    read: Callable[[], Any]
    """Writes the input and reads it, as the programs do."""
    original: Any = None
    """What the good input gives. None: there is no hash of it, so any result is accepted."""


def all_cases(folder: Path, seed: int) -> Iterator[Case]:
    """Every target's cases, in a folder of their own."""
    for number, target in enumerate((data_shards, manifests, caches, records, recipes, run_files, verb_ffns, models)):
        draw = random.Random(f"{seed}/{number}")
        yield from target(folder / target.__name__, draw)


def data_shards(folder: Path, draw: random.Random) -> Iterator[Case]:
    data = write_data(folder, 6, shards=2)
    shard, good = data / "000000.tar", (data / "000000.tar").read_bytes()

    def read() -> Any:
        opened = ShardFolder(data)
        samples = [opened.read(index) for index in range(len(opened))]
        for image in (image for sample in samples for image in sample.images):
            decode_image(image)
        return [(sample.key, sample.record, sample.images) for sample in samples]

    original = read()

    def checked() -> list[str]:
        return [problem.what for problem in lint([ShardFolder(data)])[0]]

    def with_shard(content: bytes, then: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            write(shard, content)
            return then()

        return run

    for what, content in (*damaged(good, draw), *hostile_tars("s00000", draw)):
        yield Case("data shard", what, with_shard(content, read), original)
        if content != good:
            yield Case("data shard, lint", what, with_shard(content, lambda: bool(checked())), original=True)
        yield Case("data shard, described", what, with_shard(content, lambda: describe_shard(shard) and None))

    def linked() -> Any:
        write(folder / "no shard", b"root:x:0:0")
        shard.unlink()
        shard.symlink_to(folder / "no shard")  # links to shards on another disk are common, and followed
        return read()

    yield Case("data shard", "a link to what is no shard", linked)
    yield Case("data shard", "gone", lambda: shard.unlink() or read())
    yield Case("data shard", "a folder", lambda: shard.mkdir() or read())


def manifests(folder: Path, draw: random.Random) -> Iterator[Case]:
    data = write_data(folder, 6, shards=2)
    good = (data / MANIFEST).read_bytes()
    values = json.loads(good)

    def read(content: bytes) -> Callable[[], Any]:
        def run() -> Any:
            write(data / MANIFEST, content)
            opened = ShardFolder(data)
            read_all = [opened.read(index) for index in range(len(opened))]
            return [(one.key, one.record, one.images) for one in read_all]

        return run

    original = read(good)()
    for what, content in damaged(good, draw):
        yield Case("data manifest", what, read(content), original)
    for what, content in hostile_json(values, draw, 40):
        yield Case("data manifest", what, read(content), original)
    for what, content in hostile_json({name: value for name, value in values.items() if name != "checksum"}, draw, 60):
        yield Case("data manifest without checksum", what, read(content))

    def signed_anew(shards: list, fields: dict) -> Callable[[], Any]:
        def run() -> Any:
            write_manifest(data, shards, **fields)
            opened = ShardFolder(data)
            return [opened.read(index) for index in range(len(opened))] and None

        return run

    for what, content in hostile_json(values["shards"], draw, 40):
        try:
            shards = json.loads(content)
            fields = {name: values[name] for name in ("format", "version", "split")}
            sum(shard["samples"] + shard["bytes"] for shard in shards)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # nothing that write_manifest could write
        yield Case("data manifest, signed anew", what, signed_anew(shards, fields))
    assert UNSIGNED.encode() not in good


def caches(folder: Path, draw: random.Random) -> Iterator[Case]:
    for codec in ("sampled", "topk", "hidden"):
        data = write_cached_data(folder / f"{codec} data", shards=2, each=2)
        cache = finished_cache(folder / codec, data, codec=codec)
        files = {file.name: file.read_bytes() for file in cache.iterdir() if not file.name.startswith(".")}

        def read(cache: Path = cache, data: ShardFolder = data) -> Any:
            opened = TeacherCache(cache, data)
            records = [opened.read(index) for index in range(len(data))]
            head = opened.unembedding() if opened.codec.needs_head else None
            signal = opened.signal(records, opened.layers, "cpu", head)
            tensors = [value for value in vars(signal).values() if isinstance(value, torch.Tensor)]
            return [tensor.float().numpy().tobytes() for tensor in tensors]

        original = read()
        for name, good in files.items():
            wrong = list(damaged(good, draw))
            if name.endswith(".json"):
                wrong += hostile_json(json.loads(good), draw, 12)
            if name.endswith(".tar"):
                wrong += hostile_tars("k000", draw)
            if name.endswith((".int32", ".safetensors")):
                wrong += [("a pickle", content) for content in pickles()]
            for what, content in draw.sample(wrong, min(len(wrong), 16)):
                yield Case(
                    f"cache, {codec}, {name}", what, _in_place(cache / name, content, good, read),
                    original if name not in ("head.json", "000000.json", "000001.json") else None,
                )  # fmt: skip


def _in_place(path: Path, content: bytes, good: bytes, read: Callable[[], Any]) -> Callable[[], Any]:
    """Read with a file of another content, and put it back."""

    def run() -> Any:
        write(path, content)
        try:
            return read()
        finally:
            write(path, good)

    return run


def records(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Records with the right checksum, as only someone who knows the cache can make them."""
    frame = zstandard.ZstdCompressor().compress
    bomb, unsized = _bomb(size=BOMB), _bomb(size=-1)
    tokens = frame(np.arange(3, dtype=np.uint8).tobytes())
    deep = b"\x91" * 100_000 + b"\xc0"
    contents: list[tuple[str, Any]] = [
        ("bomb as tokens", {"tokens.uint8": bomb}),
        ("bomb as a stream", {"tokens.uint8": tokens, "symbols": bomb}),
        ("bomb of unknown size", {"tokens.uint8": tokens, "symbols": unsized}),
        ("many bombs", {"tokens.uint8": tokens, **{f"s{n}": bomb for n in range(50)}}),
        ("tokens of objects", {"tokens.object": tokens}),
        ("tokens of an unknown type", {"tokens.V99999999": tokens}),
        ("a frame that is text", {"tokens.uint8": "text"}),
        ("a frame that is a number", {"tokens.uint8": 5}),
        ("names that are numbers", {5: tokens}),
        ("a list", [1, 2]),
        ("skipped by a map", {"skipped": {"a": 1}}),
        ("an extension type", msgpack.ExtType(5, b"x" * 100)),
        ("nothing", None),
        ("pickles", {"tokens.uint8": pickles()[0]}),
    ]

    def unpack(record: bytes) -> Callable[[], Any]:
        def run() -> Any:
            try:
                return [unpack_record(record, 1000, "made for")[1]]
            except ValueError as error:  # as TeacherCache.read says it
                raise CacheError(str(error)) from None

        return run

    for what, content in contents:
        packed = msgpack.packb(content)
        yield Case("cache record", what, unpack(_record(packed)))
    yield Case("cache record", "deep msgpack", unpack(_record(deep)))
    yield Case("cache record", "claims 4 GB of bytes", unpack(_record(b"\xc6\xff\xff\xff\xff")))
    yield Case("cache record", "claims 2^32 entries", unpack(b"\xdd\xff\xff\xff\xff"))
    good = pack_record(np.arange(5), {"symbols": b"abc"}, "made for")
    original = [unpack_record(good, 1000, "made for")[1]]
    for what, content in damaged(good, draw):
        yield Case("cache record", what, unpack(content), original)


def _bomb(size: int) -> bytes:
    """A frame of BOMB zeros, made without holding them; size: what it claims, -1 for nothing."""
    compressor = zstandard.ZstdCompressor().compressobj(size=size)
    chunks = [compressor.compress(bytes(2**20)) for _ in range(BOMB // 2**20)]
    return b"".join([*chunks, compressor.flush()])


def _record(packed: bytes) -> bytes:
    import zlib

    return msgpack.packb((zlib.crc32(packed, zlib.crc32(b"made for")), packed))


def recipes(folder: Path, draw: random.Random) -> Iterator[Case]:
    names = {role: folder / role for role in ("teacher", "student")}
    for path in names.values():
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"num_hidden_layers": 6, "model_type": "qwen2_vl"}))
    (folder / "data").mkdir()
    (folder / "data" / MANIFEST).write_text("{}")
    models = {("qwen2_vl", role): path for role, path in names.items()}
    path = tiny_recipe(folder, models, "qwen2_vl", folder / "data")
    good = path.read_bytes()
    values = yaml.safe_load(good)

    def read(content: bytes) -> Callable[[], Any]:
        def run() -> Any:
            write(path, content)
            check_recipe(load_recipe(path).recipe, ("verbalize", "cache", "interact", "reinforce"))

        return run

    # No hash: damage may give another recipe, but never an error that is not the recipe's.
    for what, content in (*damaged(good, draw), *hostile_yaml(), *hostile_json(values, draw, 80)):
        yield Case("recipe", what, read(content))
    write(path, good)
    evil = ("seed=!!python/name:os.system", "a" * 10_000, "seed=" + "9" * 9_000, "x=[" * 500, "data.train=\0", "=1")
    for override in evil:
        yield Case("recipe", f"--set {override[:30]}", lambda text=override: load_recipe(path, [text]) and None)
    config = names["teacher"] / "config.json"
    for what, content in (*damaged(config.read_bytes(), draw), *hostile_json({"num_hidden_layers": 6}, draw, 10)):
        yield Case("recipe, config.json", what, _in_place(config, content, config.read_bytes(), read(good)))


def run_files(folder: Path, draw: random.Random) -> Iterator[Case]:
    folder.mkdir(parents=True)
    summary = {"updates": 4, "vocab": 265, "teacher": {"layers": [1, 2], "depth": 6}}
    line = {"step": "verbalize", "update": 1, "time": 1.5, "teacher/1": 5.1}

    def read(name: str, content: bytes) -> Callable[[], Any]:
        def run() -> Any:
            write(folder / name, content)
            return (done(folder) if name == "done.json" else read_metrics(folder, "verbalize")) and None

        return run

    good = json.dumps(summary).encode()
    for what, content in (*damaged(good, draw), *hostile_json(summary, draw, 20)):
        yield Case("done.json", what, read("done.json", content))
    lines = (json.dumps(line) + "\n").encode() * 3
    for what, content in (*damaged(lines, draw), *hostile_json(line, draw, 20)):
        yield Case("metrics.jsonl", what, read("metrics.jsonl", content))


def verb_ffns(folder: Path, draw: random.Random) -> Iterator[Case]:
    path, layers, width = folder / "teacher.safetensors", (1, 2), 8
    blocks = initial_verb_ffns(layers, width, "residual", torch.float32, 0)
    save_verb_ffns(blocks.state_dict(), path)
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")

    def read() -> Any:
        stored_verb_ffns(path, layers, width, "residual", torch.float32)

    wrong = [*damaged(good, draw), *damaged(good[: 8 + header], draw), *(("a pickle", one) for one in pickles())]
    for length in (0, 2**20, 2**40, 2**63, 2**64 - 1):
        wrong.append((f"a header of {length} bytes", length.to_bytes(8, "little") + good[8:]))
    for what, content in hostile_json(json.loads(good[8 : 8 + header]), draw, 30):
        wrong.append((what, len(content).to_bytes(8, "little") + content + good[8 + header :]))
    for what, content in wrong:
        yield Case("verbalizers", what, _in_place(path, content, good, read))


def models(folder: Path, draw: random.Random) -> Iterator[Case]:
    path = write_vlm(folder / "model", "qwen2_vl", 1, 16)
    evil = f"import os\nopen(os.environ['{CANARY}'], 'w').write('code ran')\nclass Evil: pass\n"
    files = {file.name: file.read_bytes() for file in path.iterdir()}

    def processor() -> Any:
        load_processor(path)

    def weights() -> Any:
        load_vlm(path, torch.float32)

    def identity() -> Any:
        model_fingerprints(path)
        vocabulary_rows(path)

    for name, readers in (
        ("config.json", (weights, identity)), ("tokenizer.json", (processor,)), ("processor_config.json", (processor,)),
        ("tokenizer_config.json", (processor,)), ("model.safetensors", (weights,)),
        ("chat_template.jinja", (processor,)),
    ):  # fmt: skip
        good = files.get(name)
        if good is None:
            continue
        wrong = list(damaged(good, draw))
        if name.endswith(".json"):
            values = json.loads(good)
            wrong += hostile_json(values, draw, 8)
            auto = {"AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}
            remote = {**values, "auto_map": {**auto, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
            yield from _with_code(path, name, good, {**remote, "model_type": "evil"}, evil, readers)
            yield from _with_code(path, name, good, remote, evil, readers)
        for what, content in draw.sample(wrong, min(len(wrong), 8)):
            for read in readers:
                yield Case(f"model, {name}", what, _in_place(path / name, content, good, read))
    for content in pickles():
        yield Case("model", "pickled weights alone", _pickled(path, content, weights))
    yield Case("model", "gone", lambda: shutil.rmtree(path) or weights())


def _with_code(path: Path, name: str, good: bytes, values: dict, code: str, readers) -> Iterator[Case]:
    for read in readers:

        def run(read: Callable[[], Any] = read) -> Any:
            (path / "evil.py").write_text(code)
            return _in_place(path / name, json.dumps(values).encode(), good, read)()

        yield Case(f"model, {name}", "code of its own", run)


def _pickled(path: Path, content: bytes, read: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        aside = path / "aside"
        os.replace(path / "model.safetensors", aside)
        write(path / "pytorch_model.bin", content)
        try:
            return read()
        finally:
            (path / "pytorch_model.bin").unlink()
            os.replace(aside, path / "model.safetensors")

    return run
