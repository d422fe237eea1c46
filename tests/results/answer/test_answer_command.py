"""`python -m pipeline answer`: its folder, resuming, parts, rejects and messages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ending_vlm import write_ending_vlm
from tiny import chats, turn
from tiny_run import flip_a_bit, write_shards

import data_prep.lint as linter
from data_prep.schema import DataError as ShardError
from data_prep.shards import FORMAT, ShardFolder, describe_shard, shard_name, write_manifest, write_shard
from pipeline.__main__ import main
from pipeline.errors import CacheError, DataError, RecipeError
from pipeline.recipe.schema import Data
from pipeline.results.answer.folder import AnswerFolder
from pipeline.results.answer.plan import Part, make_plan, origin_of
from pipeline.results.answer.run import run
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.folder import write_json
from pipeline.vlm.assemble import chat_encoder
from pipeline.vlm.chat_template import text_of

SIZES = {"batch_size": 3, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A model, data of four shards, and the model's answers."""
    root = tmp_path_factory.mktemp("answer")
    model, data, output = write_ending_vlm(root / "model"), write_data(root / "data", 16), root / "out"
    run(plan_of(model, data, output))
    return SimpleNamespace(model=model, data=data, output=output)


def write_data(folder: Path, count: int) -> Path:
    """Data of four shards that lints clean."""
    size, entries = count // 4, []
    made = [
        (key, {"json": json.dumps(record | {"id": key}).encode()} | {f"{i}.png": one for i, one in enumerate(images)})
        for key, record, images in chats(count)
    ]
    for number in range(4):
        entries.append(write_shard(folder / shard_name(number), made[number * size : (number + 1) * size]))
    write_manifest(folder, entries, format=FORMAT, version=1, split="train")
    return folder


def plan_of(model: Path, data: Path, output: Path, share: float = 1.0, part: tuple[int, int] = (1, 1), **sizes):
    return make_plan(model, None, data, output, share, part, **(SIZES | sizes))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rejects(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


def test_the_output_mirrors_the_data_but_for_its_answers(world):
    data, out = ShardFolder(world.data), ShardFolder(world.output)
    left_out = {one["key"] for one in rejects(world.output)}
    assert out.keys == [key for key in data.keys if key not in left_out]
    assert len(out) >= 4 and left_out
    for index, key in enumerate(out.keys):
        old, new = (folder.read_members(folder.keys.index(key)) for folder in (data, out))
        before, after = json.loads(old.pop("json")), json.loads(new.pop("json"))
        assert old == new
        (entry,) = after.pop("answered")
        assert entry["given"] == text_of(before["messages"].pop())
        assert text_of(after["messages"].pop()) != entry["given"] and entry["log_prob"] < 0 < entry["tokens"]
        assert before == after
        assert out.read(index).key == key
    for shard in out.shards:
        same_name = next(one for one in data.shards if one.name == shard.name)
        assert set(describe_shard(out.path / shard.name)["keys"]) <= set(data.keys[same_name.first :][:4])


def test_the_manifest_says_where_the_answers_come_from(world):
    manifest, parent = ShardFolder(world.output).manifest, ShardFolder(world.data).manifest
    assert (manifest["format"], manifest["version"], manifest["split"]) == ("vlsi-shards", 1, "train")
    answered = manifest["answered"]
    assert (answered["model"], answered["data"]) == (str(world.model), str(world.data))
    assert answered["data_checksum"] == parent["checksum"].removeprefix("manifest-sha256:")
    assert answered["identity"]["max_new_tokens"] == "16"
    assert answered["read"] == 16 == manifest["samples"] + answered["rejected"]
    assert answered["rejected"] == len(rejects(world.output))


def test_the_output_lints_clean(world):
    assert linter.lint([ShardFolder(world.output)]) == ([], [])


def test_every_sample_of_the_output_can_be_trained_on(world):
    encoder = chat_encoder(world.model, Data(train="x"))
    dataset = ChatDataset(ShardFolder(world.output), {"student": encoder})
    for index in range(len(dataset)):
        encoded, _ = dataset[SampleIndex(index)]
        answer = text_of(dataset.folder.read(index).record["messages"][-1])
        assert encoder.processor.tokenizer.decode(encoded["student"].response_ids) == f"{answer}<|im_end|>"


def test_a_complete_folder_is_left_alone(world, capsys, monkeypatch):
    before = files(world.output)
    monkeypatch.setattr("pipeline.results.answer.run.load", None)  # no model is loaded
    run(plan_of(world.model, world.data, world.output))
    assert f"{world.output} is complete: nothing to do" in capsys.readouterr().out.replace("\n", "")
    assert files(world.output) == before


@pytest.mark.parametrize("lost", [("000002.tar", "manifest.json"), ("000001.answered.json", "000003.tar")])
def test_a_job_that_was_cut_off_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch, lost):
    output = tmp_path / "out"
    shutil.copytree(world.output, output)
    for name in lost:
        (output / name).unlink()
    asked, write = [], AnswerFolder.write
    monkeypatch.setattr(
        AnswerFolder, "write", lambda self, shard, *rest: (asked.append(shard.name), write(self, shard, *rest))
    )
    run(plan_of(world.model, world.data, output))
    assert files(output) == files(world.output)
    assert asked == sorted({f"{name[:6]}.tar" for name in lost if name != "manifest.json"})


def test_a_job_that_fails_within_a_shard_leaves_no_half_of_it(world, tmp_path, monkeypatch):
    output, read = tmp_path / "out", ShardFolder.read_members

    def fails(self, index):
        if index == 9 and self.path == world.data:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ShardFolder, "read_members", fails)
        run(plan_of(world.model, world.data, output))
    whole = files(world.output)
    assert all(whole[name] == content for name, content in files(output).items())
    assert not {"manifest.json", "000002.tar", "rejects.jsonl"} & set(files(output))
    run(plan_of(world.model, world.data, output))
    assert files(output) == whole


def test_two_parts_make_what_one_job_makes(world, tmp_path, capsys):
    output = tmp_path / "out"
    run(plan_of(world.model, world.data, output, part=(2, 2)))
    said = " ".join(capsys.readouterr().out.split())
    assert "part 2/2 is done; 2 of 4 shards are left, of part 1/2." in said and "manifest.json" in said
    assert not (output / "manifest.json").exists()
    run(plan_of(world.model, world.data, output, part=(1, 2)))
    assert "used" in capsys.readouterr().out
    assert files(output) == files(world.output)


def test_of_two_parts_that_end_at_the_same_moment_one_writes_the_manifest(world, tmp_path, monkeypatch):
    """As over NFS: the other part's sidecars are there, and are seen only after a change of this host's own."""
    output, done, late = tmp_path / "out", AnswerFolder.done, {"000001.tar", "000003.tar"}
    run(plan_of(world.model, world.data, output, part=(2, 2)))
    module = "pipeline.results.answer.folder"

    def changes(path, content):
        late.clear()
        write_json(path, content)

    monkeypatch.setattr(f"{module}.write_json", changes)
    monkeypatch.setattr(f"{module}.AGAIN_S", (0, 0))
    monkeypatch.setattr(AnswerFolder, "done", lambda self, one: None if one.name in late else done(self, one))
    run(plan_of(world.model, world.data, output, part=(1, 2)))
    assert files(output) == files(world.output)


def test_two_processes_make_what_one_makes(world, tmp_path):
    output = tmp_path / "out"
    run(plan_of(world.model, world.data, output, processes=2))
    assert files(output) == files(world.output)


def test_a_part_without_a_shard_has_nothing_to_do(world, tmp_path, capsys):
    run(plan_of(world.model, world.data, tmp_path / "out", part=(5, 5)))
    said = " ".join(capsys.readouterr().out.split())
    assert "part 5/5 is done; 4 of 4 shards are left, of part 1/5, 2/5, 3/5, 4/5." in said


def test_parts_cover_all_items_once():
    items = list(range(7))
    parts = [Part(number, 3) for number in (1, 2, 3)]
    assert sorted(item for part in parts for item in part.of(items)) == items
    assert all(item in part.owner(item).of(items) for part in parts for item in items)


def test_a_shard_that_another_process_answers_is_refused(world, tmp_path):
    output = tmp_path / "out"
    plan = plan_of(world.model, world.data, output)
    folder = AnswerFolder(output, origin_of(plan), plan.data)
    with folder.lock(plan.data.shards[0]), pytest.raises(ShardError) as refused:
        run(plan)
    assert f"{output}/000000.tar is being written by process" in str(refused.value)
    assert "--part 1/2 here and --part 2/2 there" in str(refused.value)
    run(plan)
    assert files(output) == files(world.output)


def test_rejects_are_listed_once_also_after_too_many_of_them(world, tmp_path):
    """One bad sample is forgiven; the second ends the job. With another --max-bad-share it goes on."""
    good = chats(8)
    bad = [(f"bad{i}", {**good[0][1], "id": f"bad{i}"}, [b"no"]) for i in range(2)]
    long = ("long", {**good[0][1], "id": "long", "messages": [turn("user", "x" * 5000), turn("assistant", "a")]}, [])
    data, output = write_shards(tmp_path / "train", [*bad, *good, long]), tmp_path / "out"
    with pytest.raises(DataError) as stopped:
        run(plan_of(world.model, data, output, share=0.01))
    assert "2 of 3 samples could not be used, more than data.max_bad_share=0.01; the last: bad1 in 000000.tar" in str(
        stopped.value
    )
    assert f"See {output}/rejects.jsonl, --max-bad-share in python -m pipeline answer --help" in str(stopped.value)
    assert [one["key"] for one in rejects(output)] == ["bad0", "bad1"]
    run(plan_of(world.model, data, output))
    listed = rejects(output)
    keys = [one["key"] for one in listed]
    assert keys[:2] == ["bad0", "bad1"] and keys[-1] == "long" and len(set(keys)) == len(keys)
    assert {one["shard"] for one in listed} == {"000000.tar"}
    assert "cannot be decoded" in listed[0]["reason"] and "max_length is 4096" in listed[-1]["reason"]
    assert len(ShardFolder(output)) + len(keys) == 11


def test_a_flipped_bit_costs_one_sample(world, tmp_path):
    data, output = write_shards(tmp_path / "train", chats(4)), tmp_path / "out"
    flip_a_bit(data, 1)
    run(plan_of(world.model, data, output))
    (changed,) = (one for one in rejects(output) if "do not match their checksum" in one["reason"])
    assert changed["key"] == ShardFolder(data).keys[1]
    assert changed["key"] not in ShardFolder(output).keys


def test_a_resumed_job_counts_the_rejects_of_what_is_done(world, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world.output, output)
    (output / "000003.tar").unlink()
    with pytest.raises(DataError, match=r"samples could not be used, more than data.max_bad_share=0.01"):
        run(plan_of(world.model, world.data, output, share=0.01))


def test_a_shard_without_an_answer_is_left_out(world, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    write_shards(data, [(f"bad{i}", {**chats(1)[0][1], "id": f"bad{i}"}, [b"no"]) for i in range(3)])
    with pytest.raises(DataError, match=r"none of the 3 samples of .*data has a usable answer.*rejects.jsonl"):
        run(plan_of(world.model, data, output))
    assert not list(output.glob("*.tar")) and len(rejects(output)) == 3

    whole = ShardFolder(world.data)
    shutil.copy(whole.path / "000001.tar", data / "000001.tar")
    entries = [describe_shard(data / name) for name in ("000000.tar", "000001.tar")]
    write_manifest(data, entries, format=FORMAT, version=1, split="train")
    run(plan_of(world.model, data, tmp_path / "more"))
    assert [shard.name for shard in ShardFolder(tmp_path / "more").shards] == ["000001.tar"]
    assert linter.lint([ShardFolder(tmp_path / "more")]) == ([], [])


def test_another_model_data_or_setting_is_refused_with_both_values(world, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world.output, output)
    other = write_ending_vlm(tmp_path / "other", seed=7)
    more = write_data(tmp_path / "more", 20)
    for plan, name, begun, now in (
        (plan_of(other, world.data, output), "weights", "[0-9a-f]{64}", "[0-9a-f]{64}"),
        (plan_of(world.model, more, output), "data", "[0-9a-f]{64}", "[0-9a-f]{64}"),
        (plan_of(world.model, world.data, output, max_new_tokens=8), "max_new_tokens", "16", "8"),
    ):
        with pytest.raises(RecipeError, match=f"{name}: the folder has {begun}, now {now}") as refused:
            run(plan)
        assert f"with --model {world.model} --data {world.data}" in str(refused.value)
        assert "Continue with what it was begun from, or give another --output" in str(refused.value)
    assert files(output) == files(world.output)


@pytest.mark.parametrize(("begun", "now"), [(None, 3136), (3136, None)])
def test_a_limit_that_is_set_or_left_out_since_is_refused(world, tmp_path, begun, now):
    plan = plan_of(world.model, world.data, tmp_path / "out", part=(5, 5))
    run(replace(plan, limits=plan.limits.model_copy(update={"max_pixels": begun})))
    texts = [f"any to {limit}" if limit else "none" for limit in (begun, now)]
    with pytest.raises(RecipeError, match=f"pixels: the folder has {texts[0]}, now {texts[1]}"):
        run(replace(plan, limits=plan.limits.model_copy(update={"max_pixels": now})))


def test_a_run_gives_its_teacher_its_training_data_and_its_limits(made, tmp_path):
    plan = make_plan(None, made.run, None, tmp_path / "out", **SIZES)
    assert (plan.model, plan.data.path) == (made.root / "teacher", made.root / "shards" / "train")
    assert (plan.limits.max_length, plan.limits.max_bad_share) == (512, 0.01)
    plan = make_plan(made.root / "student", made.run, made.held_out, tmp_path / "out", 0.5, **SIZES)
    assert (plan.model, plan.data.path, plan.limits.max_bad_share) == (made.root / "student", made.held_out, 0.5)


def test_mistakes_are_answered_before_a_model_is_loaded(world, made, tmp_path):
    for model, data, output, message in (
        (None, world.data, "out", "no model: give --model DIR, or --run RUN"),
        (world.model, None, "out", "no data: give --data SHARDS"),
        (tmp_path / "nowhere", world.data, "out", "no model in .*nowhere: expected a Hugging Face folder"),
        (world.model, world.data, world.data, "is the data itself; give another folder"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_plan(model, None, data, tmp_path / output, **SIZES)
    with pytest.raises(RecipeError, match=r"expected a new folder .*found manifest.json without it. Give another"):
        run(plan_of(world.model, world.data, made.held_out))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "answers.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"answers.json is damaged .*give another --output"):
        run(plan_of(world.model, world.data, tmp_path / "broken"))
    shutil.copytree(world.model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CacheError, match=r"expected weights as \*.safetensors, found none"):
        run(plan_of(tmp_path / "empty", world.data, tmp_path / "out"))


def test_the_command_ends_with_0_or_with_2_and_a_message(world, tmp_path, capsys):
    arguments = ["answer", "--model", str(world.model), "--data", str(world.data), "--output"]
    options = ["--max-bad-share", "1", "--max-new-tokens", "16", "--batch-size", "3"]
    assert main([*arguments, str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    assert "read 16 = used " in out and "set reinforce.train: " in out
    assert files(tmp_path / "out") == files(world.output)
    assert main([*arguments, str(world.data)]) == 2
    assert "error: --output" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/"])
def test_a_part_is_a_number_of_a_number(part, capsys):
    with pytest.raises(SystemExit):
        main(["answer", "--output", "x", "--part", part])
    assert f"expected I/N with I from 1 to N, such as 2/8, found '{part}'" in capsys.readouterr().err
