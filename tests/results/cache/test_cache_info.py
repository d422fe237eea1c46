"""cache-info: its tables, --verify, --sample, and its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, write_data
from tiny_run import write_recipe

from data_prep.shards import ShardFolder
from pipeline.__main__ import main
from pipeline.cache.find import folder_for
from pipeline.cache.fingerprint import tokenizer_fingerprint
from pipeline.cache.layout import CacheIdentity, sidecar_crc32
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import pack_record, to_numpy, unpack_record
from pipeline.codec.random import uniform
from pipeline.codec.vocabulary_order import order_by_use
from pipeline.errors import CacheError
from pipeline.loss.fidelity import Fidelity, measure
from pipeline.results.cache import info, verify
from pipeline.results.cache.on_disk import find_caches, inspect_cache, read_record
from pipeline.results.cache.top_tokens import read_top_tokens
from pipeline.results.report.facts import read_run
from pipeline.signal import Unembedding

LAYERS, D, V = (1, 3, 5), 8, 265
HEAD = Unembedding(torch.randn(V, D, generator=torch.Generator().manual_seed(0)), V)
CODECS = {"sampled": {"points": 32, "seed": 0}, "topk": {"k": 5}, "hidden": {"dtype": "bfloat16"}}


def example(key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample's response tokens [T] and hidden states [T, J, d], made from its key."""
    generator = torch.Generator().manual_seed(int(key[1:]))
    tokens = torch.randint(V, (int(key[1:]) * 5 % 23 + 1,), generator=generator)
    return tokens, 2 * torch.randn(len(tokens), len(LAYERS), D, generator=generator)


def write_cache(run: Path, root: Path, codec: str, names: list[str] | None = None, verify: bool = False) -> Path:
    """Write a cache as a job does, to RUN/cache/NAME, of all or some data shards; the second sample is skipped."""
    data = ShardFolder(root / "shards" / "train")
    made_by = {"weights": "a" * 64, "tokenizer": tokenizer_fingerprint(root / "teacher"), "max_length": "512"}
    made = CacheIdentity({"name": codec, **CODECS[codec]}, LAYERS, V, made_by)
    folder = CacheFolder(folder_for(run / "cache", made, data), made, data, run / "recipe.yaml")
    if "head" in folder.missing_files:
        folder.save_head(HEAD)
    if "order" in folder.missing_files:
        folder.save_order(order_by_use(HEAD.weight.sum(1).numpy()))
    for name in folder.missing(names, verify=verify):
        write_shard(folder, name)
    folder.finish(lambda sidecars: {"fidelity": Fidelity.from_json(sidecars[0]["fidelity"]).summary()})
    return folder.path


def write_shard(folder: CacheFolder, name: str) -> None:
    codec, parts = folder.codec(), []
    with folder.writer(name) as writer:
        for key in folder._shards[name]["keys"]:
            tokens, hidden = example(key)
            if key == "s00001":
                writer.skip(key, "image is broken")
                continue
            drawn = torch.from_numpy(uniform(0, "draw", key, LAYERS, len(tokens)))
            codes = {n: to_numpy(a) for n, a in codec.encode(hidden, HEAD, drawn).items()}
            writer.add(key, tokens.numpy(), codes)
            arrays = codec.unpack(codec.pack(codes), len(tokens), len(LAYERS))
            parts.append(measure(hidden, HEAD, codec.decode(arrays, HEAD)).read())
        writer.commit(fidelity=sum(parts[1:], parts[0]).to_json())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with data, a tokenizer and one run per codec. Tests do not change it."""
    root = tmp_path_factory.mktemp("cache_info")
    write_data(root / "shards" / "train", 12, shards=3)
    byte_tokenizer().save_pretrained(root / "teacher")
    for codec in CODECS:
        write_recipe(root / codec, root)
        write_cache(root / codec, root, codec)
        (cache,) = find_caches(root / codec)
        line = {"step": "cache", "update": 1, "shard": "000000.tar"}
        lines = [
            {**line, "cache": name, "tokens_per_s": speed} for name, speed in ((cache.name, 200.0), ("other", 9.0))
        ]
        (root / codec / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def copied(made, tmp_path, request) -> SimpleNamespace:
    """A copy of one run, which the test may damage: run, cache, recipe."""
    codec = getattr(request, "param", "sampled")
    shutil.copytree(made / codec, tmp_path / "run")
    write_recipe(tmp_path / "run", made)
    (cache,) = find_caches(tmp_path / "run")
    return SimpleNamespace(run=tmp_path / "run", cache=cache, recipe=tmp_path / "run" / "recipe.yaml")


def command(copied, capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code = main(["cache-info", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def repaired(copied, made) -> None:
    """Repair as --only-missing does."""
    assert (
        write_cache(copied.run, made, inspect_cache(copied.cache).identity.codec["name"], verify=True) == copied.cache
    )


def sidecar_of(copied, name="000000") -> dict:
    return json.loads((copied.cache / f"{name}.json").read_text())


@pytest.mark.parametrize("codec", CODECS)
def test_a_complete_cache_is_shown_with_its_sizes_and_fingerprints(made, capsys, codec):
    run = made / codec
    (cache,) = find_caches(run)
    code, out, _ = command(None, capsys, run)
    tokens = sum(len(example(f"s{n:05d}")[0]) for n in range(12) if n != 1)
    size = sum(file.stat().st_size for file in cache.iterdir())
    assert code == 0
    for text in (
        str(cache), f"{codec} (", "1, 3, 5 (3, the last", "265 ids", "a" * 64, tokenizer_fingerprint(made / "teacher"),
        "complete", "12, of which skipped 1", f"{tokens:,} response tokens, {3 * tokens:,} token-layers", f"{size:,}: ",
        f"{size / tokens / 3:.2f}, all files counted", "200 tokens/s (600 token-layers/s)", "fidelity, on",
    ):  # fmt: skip
        assert text in out, text
    assert "next:" not in out


def test_fidelity_is_that_of_all_shards(made, capsys):
    cache = inspect_cache(find_caches(made / "topk")[0])
    measured = info.fidelity(cache)
    parts = [Fidelity.from_json(json.loads(file.read_text())["fidelity"]) for file in cache.path.glob("0*.json")]
    assert measured.tokens == sum(part.tokens for part in parts)
    _, out, _ = command(None, capsys, cache.path)
    for layer, values in zip(LAYERS, measured.summary()["layers"], strict=True):
        row = next(line for line in out.splitlines() if re.match(rf"│ +{layer} │", line))
        assert [f"{round(values[name], 4) + 0:.4f}" for name in info.MEASURES] == re.findall(r"-?\d\.\d{4}", row)
    assert f"{measured.draw_tv():.4f}" in out


def test_every_path_that_names_a_cache(made):
    (cache,) = find_caches(made / "topk")
    assert find_caches(made / "topk" / "cache") == find_caches(cache) == [cache]
    assert inspect_cache(cache).recipe == made / "topk" / "recipe.yaml"


def test_a_run_with_another_run_s_cache_shows_that_one_and_so_does_its_report(made, tmp_path):
    run = tmp_path / "second"
    write_recipe(run, made)
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write(f"cache_from: {made / 'topk'}\n")
    (cache,) = find_caches(made / "topk")
    assert find_caches(run) == [cache]
    facts = read_run(run)
    assert facts.cache is not None and facts.cache.folder == str(cache)
    assert [step.state for step in facts.steps] == ["not begun", "in cache_from", "not begun", "not begun"]


def test_several_caches_are_listed_and_one_must_be_named(copied, made, capsys):
    other = write_cache(copied.run, made, "topk", ["000001.tar"])
    code, out, err = command(copied, capsys, copied.run, "--verify")
    assert code == 2 and f"2 caches in {copied.run}: name one" in err and f"cache-info {other}" in err
    rows = {name: next(line for line in out.splitlines() if name in line) for name in (copied.cache.name, other.name)}
    assert "complete" in rows[copied.cache.name] and "1 of 3 shards" in rows[other.name]
    code, out, _ = command(copied, capsys, other)
    assert code == 0 and f"next: deepspeed launch/cache.py --recipe {copied.recipe} --only-missing" in out


def test_an_incomplete_cache(made, tmp_path, capsys):
    run = tmp_path / "run"
    write_recipe(run, made)
    path = write_cache(run, made, "sampled", ["000002.tar"])
    cache = inspect_cache(path)
    assert not cache.complete and cache.state == "1 of 3 shards" and cache.manifest is None
    code, out, _ = command(None, capsys, run, "--verify")
    assert code == 0 and "4, of which skipped 0" in out and "verified 1 shards: 4 records" in out
    (run / "recipe.yaml").unlink()
    assert (
        inspect_cache(path).state == "1 shards, not complete"
        and "--recipe R --only-missing" in inspect_cache(path).command()
    )


def test_all_shards_without_a_manifest_are_not_complete(copied):
    (copied.cache / "manifest.json").unlink()
    assert inspect_cache(copied.cache).state == "3 of 3 shards, no manifest.json for them yet"


def test_data_that_has_grown_or_changed(copied, made, tmp_path):
    write_data(tmp_path / "more" / "shards" / "train", 16, shards=4)
    write_recipe(copied.run, tmp_path / "more")
    assert inspect_cache(copied.cache).state == "3 of 4 shards"
    write_data(tmp_path / "other" / "shards" / "train", 12, shards=3, seed=5)
    write_recipe(copied.run, tmp_path / "other")
    assert inspect_cache(copied.cache).state == "complete", "of the data that it was made for"


@pytest.mark.parametrize("codec", CODECS)
def test_verify_of_a_good_cache_prints_its_speed(made, capsys, codec):
    code, out, err = command(None, capsys, made / codec, "--verify")
    assert (code, err) == (0, "")
    assert re.search(r"verified 3 shards: 11 records, \d+ token-layers decoded in .* token-layers/s", out)


@pytest.mark.parametrize("copied", CODECS, indirect=True)
def test_verify_finds_a_flipped_byte_in_its_record(copied, capsys):
    sidecar = sidecar_of(copied)
    flip(copied.cache / "000000.tar", sidecar["offsets"][2] + 512 + 40)
    assert command(copied, capsys, copied.run)[0] == 0, "sizes alone do not show it"
    code, out, err = command(copied, capsys, copied.run, "--verify")
    assert code == 2 and "2 problem(s). Put it right" in err
    assert f"deepspeed launch/cache.py --recipe {copied.recipe} --only-missing" in err
    assert "s00002" in out and "s00003" not in out and "000000.tar: changed: expected SHA-256" in out


def test_verify_finds_a_damaged_tar_header(copied):
    flip(copied.cache / "000001.tar", sidecar_of(copied, "000001")["offsets"][1])
    problems = [p for shard in verify.check_shards(inspect_cache(copied.cache), 1) for p in shard.problems]
    assert [problem.key for problem in problems] == ["", "s00005"]
    assert "its place in the tar is damaged" in problems[1].what


def test_a_truncated_shard_is_named_at_once_and_verify_lists_what_is_lost(copied, capsys):
    file, sidecar = copied.cache / "000001.tar", sidecar_of(copied, "000001")
    file.write_bytes(file.read_bytes()[: sidecar["offsets"][1] + 100])
    _, out, _ = command(copied, capsys, copied.run)
    assert "2 of 3 shards" in out and "000001.tar: cut off or changed: expected" in out and "--only-missing" in out
    code, out, err = command(copied, capsys, copied.cache, "--verify")
    assert code == 2 and "--only-missing" in err
    assert "000001.tar: s00005 to s00007 (3): the file ends before the record does" in out


def test_only_missing_would_make_what_verify_finds(copied, made):
    """The command that verify names finds the same shards, from sidecars, files and hashes."""
    flip(copied.cache / "000000.tar", 512 + 40)
    (copied.cache / "000001.json").write_text("{")
    (copied.cache / "000002.tar").unlink()
    cache = inspect_cache(copied.cache)
    folder = CacheFolder(copied.cache, cache.identity, ShardFolder(made / "shards" / "train"))
    checked = verify.check_shards(cache, 2)
    assert [shard.name for shard in checked if shard.problems] == ["000000.tar", "000002.tar"]
    assert set(folder.missing(verify=True)) == {"000000.tar", "000001.tar", "000002.tar"}
    problems = {problem.file: problem.what for problem in verify.check_other_files(cache)}
    assert problems == {"000001.json": "the sidecar is gone or damaged; the manifest still has it"}
    with pytest.raises(CacheError, match=r"4 problem\(s\)"):
        verify.run(cache)


def rewrite(copied, made, change) -> None:
    """Replace the last shard's records, with a matching sidecar and manifest, as a faulty writer would."""
    cache = inspect_cache(copied.cache)
    folder = CacheFolder(copied.cache, cache.identity, ShardFolder(made / "shards" / "train"))
    sidecar = cache.sidecars["000002.tar"]
    with folder.writer("000002.tar") as writer:
        for place, key in enumerate(sidecar["keys"]):
            with open(copied.cache / "000002.tar", "rb") as file:
                tokens, streams = unpack_record(read_record(file, sidecar, place), 2**20, cache.made_for)
            writer._add_record(key, pack_record(tokens, change(streams), cache.made_for))
        writer._tokens = sidecar["tokens"]
        writer.commit()
    folder.finish()


@pytest.mark.parametrize(
    ("copied", "change", "message"),
    [
        ("sampled", lambda s: {**s, "symbols": s["symbols"][:-1]}, "does not hold 32 points"),
        ("sampled", lambda s: {n: b for n, b in s.items() if n != "bits"}, "does not decode: KeyError('bits')"),
        ("topk", lambda s: {**s, "ids.uint16": b"\xff" * len(s["ids.uint16"])}, "outside of 0..264"),
        ("topk", lambda s: {**s, "tail.float32": b"\xff" * len(s["tail.float32"])}, "do not sum to 1"),
        ("hidden", lambda s: {n: b"\xff" * len(b) for n, b in s.items()}, "hidden states that are not finite"),
    ],
    indirect=["copied"],
)
def test_records_that_are_whole_and_wrong_are_found_and_their_sidecar_must_go(copied, made, capsys, change, message):
    rewrite(copied, made, change)
    code, out, err = command(copied, capsys, copied.cache, "--verify")
    assert code == 2 and message in out
    assert f"Put it right: rm {copied.cache}/000002.json && deepspeed launch/cache.py" in err


def test_a_sidecar_that_miscounts(copied):
    sidecar = sidecar_of(copied)
    changed = {**sidecar, "tokens": sidecar["tokens"] + 1}
    (copied.cache / "000000.json").write_text(json.dumps({**changed, "crc32": sidecar_crc32(changed)}))
    checked = verify.check_shards(inspect_cache(copied.cache), 1)
    assert f"its sidecar says {sidecar['tokens'] + 1} tokens and 1 skipped" in checked[0].problems[0].what
    assert [problem.file for problem in verify.check_other_files(inspect_cache(copied.cache))] == ["manifest.json"]


@pytest.mark.parametrize("field", ["offsets", "end", "tokens", "data_sha256"])
def test_a_sidecar_that_changed_is_found_and_repaired(copied, made, capsys, field):
    sidecar, before = copied.cache / "000000.json", sidecar_of(copied)
    value = {"offsets": [0, *before["offsets"][1:-1], 1], "data_sha256": "0" * 64}.get(field, 7)
    sidecar.write_text(json.dumps({**before, field: value}))
    code, out, err = command(copied, capsys, copied.cache, "--verify")
    assert code == 2 and "000000.json: the sidecar is gone or damaged" in out and "--only-missing" in err
    repaired(copied, made)
    assert sidecar_of(copied) == before and command(copied, capsys, copied.cache, "--verify")[0] == 0


@pytest.mark.parametrize("copied", ["hidden"], indirect=True)
def test_verify_finds_a_damaged_head_and_a_job_makes_it_again(copied, made, capsys):
    head = copied.cache / "head.safetensors"
    whole = head.read_bytes()
    flip(head, -1)
    code, out, err = command(copied, capsys, copied.cache, "--verify")
    assert code == 2 and "head.safetensors is damaged: expected SHA-256" in out
    assert err.endswith(f"Put it right: deepspeed launch/cache.py --recipe {copied.recipe} --only-missing\n")
    repaired(copied, made)
    assert head.read_bytes() == whole and command(copied, capsys, copied.cache, "--verify")[0] == 0


@pytest.mark.parametrize("copied", ["hidden"], indirect=True)
def test_verify_finds_a_head_whose_hash_is_lost_or_another(copied, made, capsys):
    manifest = copied.cache / "manifest.json"
    recorded = json.loads(manifest.read_text())["head_sha256"]
    lines = manifest.read_text().replace(recorded, "0" * 64).split("\n")
    manifest.write_text("\n".join(line for line in lines if '"checksum"' not in line))  # as an older version's
    assert "manifest.json: it does not say of the head" in command(copied, capsys, copied.cache, "--verify")[1]
    repaired(copied, made)
    (copied.cache / "head.json").unlink()
    assert "expected SHA-256 none recorded" in command(copied, capsys, copied.cache, "--verify")[1]
    repaired(copied, made)
    assert command(copied, capsys, copied.cache, "--verify")[0] == 0


def test_a_foreign_shard_is_named(copied, made):
    (other,) = find_caches(made / "topk")
    for name in ("000001.tar", "000001.json"):
        shutil.copy(other / name, copied.cache / name)
    cache = inspect_cache(copied.cache)
    assert cache.missing == {"000001.tar": "made for another cache"}
    checked = verify.check_shards(cache, 1)
    assert [(p.key, p.what) for p in checked[1].problems] == [("", "made for another cache")]


def test_a_missing_order_is_reported_with_its_command(copied, capsys):
    (copied.cache / "order.int32").unlink()
    code, _, err = command(copied, capsys, copied.cache, "--verify")
    assert code == 2 and "no order.int32" in err and f"--recipe {copied.recipe} --only-missing" in err


@pytest.mark.parametrize("codec", CODECS)
def test_a_sample_shows_the_top_tokens_of_each_layer(made, capsys, codec):
    tokens, hidden = example("s00002")
    _, out, _ = command(None, capsys, made / codec, "--sample", "s00002")
    probs = HEAD.logits(hidden.bfloat16() if codec == "hidden" else hidden).softmax(-1)
    top = read_top_tokens(inspect_cache(find_caches(made / codec)[0]), "s00002")
    assert top.tokens == tokens.tolist() and top.shard == "000000.tar"
    for t in range(len(tokens)):
        for j in range(len(LAYERS)):
            p = float(probs[t, j, top.top_ids[t][j]])
            if codec == "sampled":  # each id, and each range of neighbours, gets N p points, rounded down or up
                count, points = map(int, top.shares[t][j].split("/"))
                assert points == 32 and abs(count - 32 * p) < 2
            else:
                assert top.top_ids[t][j] == int(probs[t, j].argmax())
                assert float(top.shares[t][j]) == pytest.approx(p, abs=0.006)
    assert f"s00002, in 000000.tar: {len(tokens)} response tokens" in out
    first = byte_tokenizer().decode([int(tokens[0])])
    assert repr(first) in out and "layer 1" in out and "last layer" in out and "may be wrong" not in out


def test_a_long_sample_is_cut_with_a_note(made, capsys):
    (long,) = [key for key in (f"s{n:05d}" for n in range(12)) if len(example(key)[0]) == 21]
    _, out, _ = command(None, capsys, made / "topk", "--sample", long)
    assert "and 5 tokens more" in out and re.search(r"^ *16 ", out, re.M) and not re.search(r"^ *17 ", out, re.M)


def test_another_tokenizer_gives_a_warning(copied, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "other")
    code, out, _ = command(copied, capsys, copied.run, "--sample", "s00000", "--tokenizer", tmp_path / "other")
    assert code == 0 and "Words may be wrong" in out and tokenizer_fingerprint(tmp_path / "other") in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no teacher cache at nowhere: expected a cache's folder (with cache.json in it), a run's cache/"),
        (["nowhere"], "found no such folder. Make one: deepspeed launch/cache.py --recipe R"),
        (["file"], "found a file"),
        (["shards"], "found a folder without any"),
        (["empty"], "recipe.yaml"),
        (["run", "--sample", "nobody"], "not among the 12 keys of"),
        (["run", "--sample", "nobody"], "the first are s00000, s00001, s00002"),
        (["run", "--sample", "s00001"], "skipped when the teacher cache was made: image is broken"),
        (["run", "--sample", "s00000", "--tokenizer", "nowhere"], "no tokenizer in nowhere: expected"),
        (["run", "--tokenizer", "nowhere"], "give a key too"),
    ],
)
def test_mistakes_end_with_code_2_and_a_message(made, copied, tmp_path, capsys, arguments, message):
    write_recipe(tmp_path / "empty", made)
    places = {"run": copied.run, "file": copied.recipe, "shards": made / "shards", "empty": tmp_path / "empty"}
    code, _, err = command(copied, capsys, *(places.get(one, one) for one in arguments))
    assert code == 2 and err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_run_without_a_tokenizer_asks_for_one(copied, tmp_path, capsys):
    write_recipe(copied.run, tmp_path)
    code, _, err = command(copied, capsys, copied.run, "--sample", "s00000")
    assert code == 2 and f"no tokenizer to read ids with ({tmp_path}/teacher" in err and "--tokenizer DIR" in err
    byte_tokenizer().save_pretrained(copied.run / "student")
    assert command(copied, capsys, copied.run, "--sample", "s00000")[0] == 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cache.json", '{"version": 7}', "expected cache format version 2, found 7"),
        ("cache.json", "{", "cache.json is damaged"),
        ("manifest.json", "{", "manifest.json is damaged"),
    ],
)
def test_a_cache_that_cannot_be_read_names_the_command(copied, capsys, file, content, message):
    (copied.cache / file).write_text(content)
    code, _, err = command(copied, capsys, copied.run)
    assert code == 2 and message in err and f"deepspeed launch/cache.py --recipe {copied.recipe}" in err


def test_a_damaged_record_is_not_shown(copied, capsys):
    flip(copied.cache / "000000.tar", sidecar_of(copied)["offsets"][0] + 512 + 40)
    code, _, err = command(copied, capsys, copied.run, "--sample", "s00000")
    assert code == 2 and "record 's00000' is damaged" in err and f"cache-info {copied.cache} --verify" in err


def test_its_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["cache-info", "--help"])
    assert "python -m pipeline cache-info runs/demo" in capsys.readouterr().out
