"""cache-info --suspects: the scores against a naive float64 reference, the order, the table, the JSONL file, errors."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from random_cache import HEAD, LAYERS, V, encode_record, fill, identity
from random_teacher import hidden_and_head, random_order, round_trip
from tiny import turn
from tiny_run import write_recipe

from data_prep.shards import ShardFolder, write_manifest, write_shard
from pipeline.__main__ import main
from pipeline.cache.writer import CacheFolder
from pipeline.codec.packing import pack_record
from pipeline.codec.registry import make_codec
from pipeline.results.cache import suspects
from pipeline.results.cache.likelihood import CHUNK, given_log_probs, score
from pipeline.results.cache.on_disk import find_caches, inspect_cache
from pipeline.results.cache.suspects import rank

CODECS = {"sampled": {"points": 32, "seed": 0}, "topk": {"k": 4}, "hidden": {"dtype": "float32"}}
SKIPPED = "k002"


def outputs(key: str, layers=LAYERS) -> tuple[np.ndarray, torch.Tensor]:
    """Random response tokens [T] and peaked hidden states [T, J, D] of a sample."""
    generator = torch.Generator().manual_seed(int(key[1:]))
    tokens = torch.randint(V, (int(key[1:]) * 5 % 7 + 1,), generator=generator).numpy()
    return tokens, 3 * torch.randn(len(tokens), len(layers), 8, generator=generator)


def reference(key: str, codec: str) -> list[float]:
    """log p of each response token, as the module's docstring says, one token at a time in float64."""
    tokens, hidden = outputs(key)
    made = make_codec(codec, **CODECS[codec], **({"order": random_order(V)} if codec == "sampled" else {}))
    arrays = encode_record(made, key, hidden)
    found = []
    for t, token in enumerate(tokens.tolist()):
        logits = (hidden[t, -1].double() @ HEAD.weight[:V].double().T) * HEAD.scale
        p = (HEAD.softcap * (logits / HEAD.softcap).tanh()).softmax(-1)
        if codec == "hidden":
            found.append(math.log(p[token]))
        elif codec == "sampled":
            points = [int(random_order(V)[rank]) for rank in arrays["ranks"][t, -1]]
            found.append(math.log(max(points.count(token), 0.5) / 32))
        else:
            largest = sorted(p.tolist(), reverse=True)
            outside = min(sum(largest[4:]), largest[3]) / 2
            found.append(math.log(p[token] if p[token] >= largest[3] else outside))
    return found


def write_chats(folder: Path, noisy=(), count=12, unsaid=()) -> Path:
    """A data folder of 3 shards of question and answer, those in `noisy` wrong.

    Where `noisy` is None, and for keys in `unsaid`, provenance does not say what is wrong.
    """
    folder.mkdir(parents=True)
    entries = []
    for shard in range(3):
        keys = [f"k{shard * count // 3 + i:03d}" for i in range(count // 3)]
        samples = []
        for key in keys:
            known = {} if noisy is None or key in unsaid else {"noise": key in noisy}
            messages = [turn("user", "what\x1b[31m is it?"), turn("assistant", f"answer {key}")]
            record = {"id": key, "messages": messages, "provenance": known}
            samples.append((key, {"json": json.dumps(record).encode()}))
        entries.append(write_shard(folder / f"{shard:06d}.tar", samples))
    write_manifest(folder, entries, format="vlsi-shards", version=1, split="train")
    return folder


def write_cache(root: Path, codec: str, names=None, made=outputs) -> Path:
    """Write a run's cache of the data in root/shards/train, with one skipped sample; returns the cache's folder."""
    run = root / codec
    if not (run / "recipe.yaml").is_file():
        write_recipe(run, root)
    folder = run / "cache" / f"{codec}-1"
    data = ShardFolder(root / "shards" / "train")
    fill(CacheFolder(folder, identity(codec, **CODECS[codec]), data), data, names, skip=(SKIPPED,), outputs=made)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A root with data, of which some is known to be wrong, and one run per codec. Tests do not change it."""
    root = tmp_path_factory.mktemp("suspects")
    write_chats(root / "shards" / "train", noisy=("k001", "k002", "k004", "k009"))
    for codec in CODECS:
        write_cache(root, codec)
    return root


def command(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code = main(["cache-info", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(out: str) -> list[str]:
    """The lines of the table's rows: those that begin with a rank and a key."""
    return [line for line in out.splitlines() if re.match(r" *\d+ +k\d", line)]


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("at_once", [1, 5, 4096])
def test_scores_are_the_naive_ones(made, codec, at_once, monkeypatch):
    monkeypatch.setattr(suspects, "BATCH_TOKENS", at_once)
    ranked = rank(inspect_cache(made / codec / "cache" / f"{codec}-1"))
    assert {one.key for one in ranked} == {f"k{i:03d}" for i in range(12)} - {SKIPPED}
    for one in ranked:
        expected = reference(one.key, codec)
        tolerance = -min(expected) * 2**-10 if codec == "topk" else 1e-5  # float16: half a unit of 11 digits, doubled
        assert one.tokens == len(expected) and one.shard == f"{int(one.key[1:]) // 4:06d}.tar"
        assert one.index == int(one.key[1:]) % 4
        assert one.log_prob == pytest.approx(sum(expected) / len(expected), abs=tolerance)
        assert one.lowest == pytest.approx(min(expected), abs=tolerance)
        assert expected[one.lowest_position - 1] == pytest.approx(min(expected), abs=tolerance)
    order = [(one.log_prob, one.lowest, one.key) for one in ranked]
    assert order == sorted(order) and len({one.log_prob for one in ranked}) > 5


def test_the_codecs_have_tokens_that_are_kept_and_tokens_that_are_not():
    """Otherwise the estimates for ids that a record does not hold would go untested."""
    given = [token for i in range(12) for token in reference(f"k{i:03d}", "sampled")]
    assert min(given) == math.log(1 / 64) < max(given)
    exact = [token for i in range(12) for token in reference(f"k{i:03d}", "hidden")]
    stored = [token for i in range(12) for token in reference(f"k{i:03d}", "topk")]
    equal = [math.isclose(a, b) for a, b in zip(exact, stored, strict=True)]
    assert any(equal) and not all(equal)


def test_hidden_is_as_exact_as_float32_in_chunks():
    hidden, head = hidden_and_head(vocab=500, tokens=2 * CHUNK + 3)
    codec = make_codec("hidden", dtype="float32")
    tokens = torch.arange(len(hidden)) % 500
    signal = codec.decode(round_trip(codec, hidden, head), head)
    found = given_log_probs(signal, tokens, codec).double()
    logits = (hidden[:, -1].double() @ head.weight[:500].double().T + head.bias[:500].double()) * head.scale
    truth = (head.softcap * (logits / head.softcap).tanh()).log_softmax(-1)[torch.arange(len(hidden)), tokens]
    naive = head.logits(hidden[:, -1]).log_softmax(-1)[torch.arange(len(hidden)), tokens].double()
    assert ((found - truth).abs() <= (naive - truth).abs() + 1e-5).all()


def test_an_underflown_probability_has_a_finite_logarithm():
    codec = make_codec("topk", k=3)
    arrays = {
        "ids": np.array([[[0, 1, 2]]], np.uint8),
        "logprobs": np.array([[[0.0, -900.0, -np.inf]]], np.float16),
        "tail": np.zeros((1, 1, 1), np.float32),
    }
    signal = codec.decode(arrays)
    for token in (1, 2, 7):
        assert given_log_probs(signal, torch.tensor([token]), codec).item() == pytest.approx(-87.34, abs=0.01)
    assert given_log_probs(signal, torch.tensor([0]), codec).item() == 0


def test_the_score_is_the_mean_and_the_first_of_the_lowest():
    assert score(np.array([-0.5, -3.0, -3.0, 0.0], np.float32)) == (-1.625, -3.0, 2)
    assert score(np.array([-1 / 3], np.float32)) == (-0.333333, -0.333333, 1)


def test_ties_are_broken_by_the_lowest_token_and_then_by_key(tmp_path):
    """The same probabilities in another order are a tie."""
    one = {"k000": [1, 1, 1], "k001": [1, 1, 1]}
    two = {"k004": [3, 1, 2], "k005": [2, 3, 1], "k006": [1, 2, 3]}
    fixed = torch.randn(1, len(LAYERS), 8, generator=torch.Generator().manual_seed(1))

    def tied(key, layers=LAYERS):
        tokens = np.array({**one, **two}.get(key, [4]))
        return tokens, fixed.expand(len(tokens), -1, -1).clone()

    write_chats(tmp_path / "shards" / "train")
    path = write_cache(tmp_path, "hidden", made=tied)
    ranked = rank(inspect_cache(path))
    groups: dict[float, list[str]] = {}
    for suspect in ranked:
        groups.setdefault(suspect.log_prob, []).append(suspect.key)
    assert ["k000", "k001"] in groups.values() and ["k004", "k005", "k006"] in groups.values()
    assert sorted(groups) == list(groups)
    assert [s.lowest_position for s in ranked if s.key in two] in ([1, 2, 3], [3, 1, 2], [2, 3, 1])
    same = [suspects.Suspect(key, "s", 0, 2, -2.0, lowest, 1) for key, lowest in (("b", -3.0), ("a", -3.0), ("c", -4))]
    assert [one.key for one in sorted(same, key=suspects.by_suspicion)] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("codec", "how"),
    [
        ("sampled", "points on the token, of 32; a token without one counts as 1/64"),
        ("topk", "half of the smaller of the tail and the smallest kept one"),
        ("hidden", "exactly, through the cached head"),
    ],
)
def test_the_table_has_scores_texts_and_how_they_were_made(made, capsys, wide, codec, how):
    code, out, err = command(capsys, made / codec, "--suspects", "--limit", 3)
    assert (code, err) == (0, "")
    ranked = rank(inspect_cache(find_caches(made / codec)[0]))
    rows = rows_of(out)
    assert len(rows) == 3
    for number, (row, one) in enumerate(zip(rows, ranked, strict=False), 1):
        assert re.split(" {2,}", row.strip()) == [
            str(number), one.key, one.shard, f"{one.log_prob:.3f}", f"{one.lowest:.3f}",
            f"{one.lowest_position} of {one.tokens}", "what [31m is it?", f"answer {one.key}",
        ]  # fmt: skip
    assert how in out and "read 11 samples of 3 shards; the cache job had skipped 1 more" in out
    assert "not complete" not in out and "fidelity" not in out and "\x1b" not in out


def test_twenty_are_shown_without_a_limit(tmp_path, capsys, wide):
    write_chats(tmp_path / "shards" / "train", noisy=None, count=24)
    write_cache(tmp_path, "topk")
    _, out, _ = command(capsys, tmp_path / "topk", "--suspects")
    assert len(rows_of(out)) == 20 and "read 23 samples" in out


def test_the_file_has_every_sample_ranked(made, tmp_path, capsys):
    file = tmp_path / "new" / "suspects.jsonl"
    assert command(capsys, made / "sampled", "--suspects", "--limit", 1, "--output", file)[0] == 0
    ranked = rank(inspect_cache(find_caches(made / "sampled")[0]))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {
            "rank": number, "key": one.key, "shard": one.shard, "log_prob": one.log_prob, "lowest": one.lowest,
            "lowest_position": one.lowest_position, "tokens": one.tokens,
            "planted": one.key in ("k001", "k004", "k009"),
        }
        for number, one in enumerate(ranked, 1)
    ]  # fmt: skip
    assert len(lines) == 11 and list(file.parent.iterdir()) == [file]


def test_planted_noise_is_counted_among_the_first(made, tmp_path, capsys):
    """Three of the ranked ones are wrong, those of rank 1, 3 and 4; so is the skipped one, which has no rank."""
    ranked = [one.key for one in rank(inspect_cache(find_caches(made / "hidden")[0]))]
    write_chats(tmp_path / "shards" / "train", noisy=(ranked[0], ranked[2], ranked[3], SKIPPED))
    write_cache(tmp_path, "hidden")
    _, out, _ = command(capsys, tmp_path / "hidden", "--suspects")
    assert "known wrong answers: 3; of the first 3 suspects 2 are known to be wrong." in out


def test_a_sample_that_does_not_say_whether_it_is_wrong_is_left_out(tmp_path, capsys):
    write_chats(tmp_path / "shards" / "train", noisy=("k005",), unsaid=("k001", "k005"))
    ranked = [one.key for one in rank(inspect_cache(write_cache(tmp_path, "topk")))]
    assert "k001" in ranked[1:], "the first one decides whether the others are read"
    command(capsys, tmp_path / "topk", "--suspects", "--output", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines if "planted" in line] == [k for k in ranked if k not in ("k001", "k005")]


def test_wrong_answers_of_a_teacher_that_knows_come_first(tmp_path, capsys):
    """The direction of the ranking: three answers are the teacher's last choice, the others its first."""
    wrong = ("k003", "k006", "k011")

    def outputs_of_one_who_knows(key, layers=LAYERS):
        _, hidden = outputs(key)
        logits = HEAD.logits(hidden[:, -1])
        return (logits.argmin(-1) if key in wrong else logits.argmax(-1)).numpy(), hidden

    write_chats(tmp_path / "shards" / "train", noisy=wrong)
    for codec in CODECS:
        write_cache(tmp_path, codec, made=outputs_of_one_who_knows)
        _, out, _ = command(capsys, tmp_path / codec, "--suspects")
        assert "known wrong answers: 3; of the first 3 suspects 3 are known to be wrong." in out, codec


@pytest.mark.parametrize("noisy", [None, ()], ids=["unsaid", "none"])
def test_data_without_planted_noise_has_no_such_line(tmp_path, capsys, noisy):
    write_chats(tmp_path / "shards" / "train", noisy=noisy)
    write_cache(tmp_path, "topk")
    _, out, _ = command(capsys, tmp_path / "topk", "--suspects", "--output", tmp_path / "out.jsonl")
    assert "known" not in out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line.get("planted") for line in lines} == ({None} if noisy is None else {False})


@pytest.mark.parametrize("change", ["gone", "other", "damaged", "no recipe"])
def test_without_the_data_that_was_cached_keys_stand_alone(tmp_path, capsys, wide, change):
    train = write_chats(tmp_path / "shards" / "train", noisy=("k001",))
    write_cache(tmp_path, "topk")
    if change == "gone":
        train.rename(tmp_path / "moved")
    elif change == "other":
        train.rename(tmp_path / "moved")
        write_chats(train, noisy=None)
    elif change == "damaged":
        for shard in train.glob("*.tar"):
            shard.write_bytes(b"\0" * shard.stat().st_size)
    else:
        (tmp_path / "topk" / "recipe.yaml").unlink()
    code, out, err = command(capsys, tmp_path / "topk", "--suspects")
    assert (code, err) == (0, "") and "k001" in out and "question" not in out and "known wrong" not in out


def test_an_incomplete_cache_is_ranked_as_far_as_it_goes(made, tmp_path, capsys):
    write_chats(tmp_path / "shards" / "train", noisy=("k001", "k009"))
    path = write_cache(tmp_path, "hidden", names=["000000.tar", "000002.tar"])
    (path / "000002.tar").write_bytes(b"cut off")
    code, out, _ = command(capsys, tmp_path / "hidden", "--suspects", "--output", tmp_path / "out.jsonl")
    assert code == 0 and "read 3 samples of 1 shards; the cache job had skipped 1 more" in out
    assert "The cache is not complete (1 of 3 shards): only these are ranked. Make the rest: deepspeed" in out
    assert "known wrong answers: 1;" in out
    keys = {json.loads(line)["key"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}
    assert keys == {"k000", "k001", "k003"}


def test_verify_runs_as_well(made, capsys):
    code, out, _ = command(capsys, made / "topk", "--suspects", "--verify")
    assert code == 0 and "suspects: answers that" in out and "verified 3 shards: 11 records" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suspects", "--sample", "k000"], "--suspects ranks all samples, --sample KEY shows one of them"),
        (["--suspects", "--tokenizer", "T"], "--tokenizer DIR turns ids into words for --sample KEY"),
        (["--limit", "3"], "--limit N is for the ranking of --suspects: give --suspects too"),
        (["--output", "out.jsonl"], "--output FILE is for the ranking of --suspects"),
        (["--sample", "k000", "--limit", "3"], "--limit N is for the ranking of --suspects"),
        (["--suspects", "--output", "."], "--output . is a folder; name a file in it, such as suspects.jsonl"),
        (["--suspects", "--output", "/dev/null/out"], "--output /dev/null/out cannot be written"),
    ],
)
def test_mistakes_end_with_code_2_and_a_message(made, capsys, arguments, message):
    code, _, err = command(capsys, made / "topk", *arguments)
    assert code == 2 and err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_cache_without_a_whole_shard(tmp_path, capsys):
    write_chats(tmp_path / "shards" / "train")
    path = write_cache(tmp_path, "topk", names=[])
    code, _, err = command(capsys, path, "--suspects")
    assert code == 2 and f"{path} has no whole shard yet (0 of 3 shards). Make it: deepspeed" in err


def test_a_damaged_record_is_named(tmp_path, capsys):
    write_chats(tmp_path / "shards" / "train")
    path = write_cache(tmp_path, "sampled")
    sidecar = json.loads((path / "000001.json").read_text())
    content = bytearray((path / "000001.tar").read_bytes())
    content[sidecar["offsets"][2] + 512 + 40] ^= 4
    (path / "000001.tar").write_bytes(content)
    code, _, err = command(capsys, path, "--suspects")
    assert code == 2 and f"{path}/000001.tar is damaged: record 'k006': expected checksum" in err
    assert f"python -m pipeline cache-info {shlex.quote(str(path))} --verify" in err


@pytest.mark.parametrize(
    ("codec", "tokens", "states", "message"),
    [
        ("topk", [V], 0.0, "response tokens outside of 0..19"),
        ("hidden", [3], math.nan, "probabilities that are not finite"),
    ],
)
def test_records_that_are_whole_and_wrong(tmp_path, capsys, codec, tokens, states, message):
    """Written by a faulty program: the writer itself refuses what is not finite."""
    write_chats(tmp_path / "shards" / "train")
    path = write_cache(tmp_path, codec)
    cache = CacheFolder(path, identity(codec, **CODECS[codec]), ShardFolder(tmp_path / "shards" / "train"))
    made, keys = cache.codec(), json.loads((path / "000001.json").read_text())["keys"]
    hidden = torch.full((1, len(LAYERS), 8), states)
    with cache.writer("000001.tar") as writer:
        for key in keys:
            streams = made.pack(encode_record(made, key, hidden))
            writer._add_record(key, pack_record(np.array(tokens), streams, inspect_cache(path).made_for))
        writer.commit()
    code, _, err = command(capsys, path, "--suspects")
    assert code == 2 and f"000001.tar is damaged: it has {message}" in err
