import json
import math
import shutil

import pytest
import torch
from tiny import QWEN_CHAT, THINKING_CHAT, chats, png, turn
from tiny_run import flip_a_bit, typed, write_shards

from data_prep.shards import FORMAT, ShardFolder, write_manifest
from pipeline.errors import DataError, RecipeError
from pipeline.recipe.schema import Data
from pipeline.results.arguments import batches, evenly_spaced
from pipeline.results.evaluate import scoring
from pipeline.results.evaluate.answers import last_exchange, normalise
from pipeline.results.evaluate.evaluation import evaluate, score_question_only
from pipeline.results.evaluate.plan import Plan, make_plan
from pipeline.results.evaluate.scoreboard import show
from pipeline.results.evaluate.scoring import Scorer, response_loss, summarize
from pipeline.results.generate import decode_text, greedy, load
from pipeline.results.identity import model_identity

SIZES = {"limit": None, "batch_size": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def teacher(made):
    return load(made.root / "teacher", limits())


def limits(max_bad_share: float = 1.0) -> Data:
    return Data(train="x", max_length=512, max_bad_share=max_bad_share)


def plan_for(data, **changes) -> Plan:
    return Plan({}, ShardFolder(data), **(SIZES | {"limits": limits()} | changes))


def score(vlm, plan: Plan) -> dict:
    scorer = Scorer(vlm, plan.data, plan.max_new_tokens)
    return summarize(map(scorer, batches(plan.indices(), plan.batch_size)), plan)


def test_perplexity_is_the_exponential_of_the_mean_over_all_response_tokens(made, teacher):
    folder = ShardFolder(made.held_out)
    nats, tokens = 0.0, 0
    for raw in (folder.read(index) for index in range(len(folder))):
        chat = teacher.encoder(raw.key, raw.record["messages"], raw.images)
        with torch.no_grad():
            log_p = teacher.model(**chat.inputs).logits[0].double().log_softmax(-1)
        positions = torch.nonzero(chat.response)[:, 0]
        nats -= float(log_p[positions - 1, chat.response_ids].sum())
        tokens += len(positions)
    result = score(teacher, plan_for(made.held_out))
    assert result["response_tokens"] == tokens
    assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_batch_size_changes_no_result(made, teacher):
    one, all_ = (score(teacher, plan_for(made.held_out, batch_size=size)) for size in (1, 10))
    assert one.pop("perplexity") == pytest.approx(all_.pop("perplexity"), rel=1e-6)
    assert one == all_


def test_right_answers_are_counted_in_total_and_by_type(tmp_path, teacher):
    """Reference answers of the first four samples are the model's own, in other case and punctuation."""
    samples = []
    for index, (key, record, images) in enumerate(chats(8, seed=3)):
        ids = greedy(teacher, teacher.encoder.prompt(record["messages"][:1], images), 6)[0]
        model_answer = decode_text(teacher, ids)
        answer = (
            f"{model_answer.upper()}."
            if index < 4 and normalise(model_answer.upper()) == normalise(model_answer)
            else "zz"
        )
        question_type = "easy" if index < 4 else "hard"
        samples.append((key, {**record, "messages": [record["messages"][0], turn("assistant", answer)],
                              "question_type": question_type}, images))  # fmt: skip
    expected = sum("zz" not in str(record["messages"]) for _, record, _ in samples)
    assert expected >= 2
    result = score(teacher, plan_for(write_shards(tmp_path / "held_out", samples)))
    assert result["exact_match"] == expected / 8
    assert result["wrong"] == [key for key, record, _ in samples if "zz" in str(record["messages"])]
    assert result["by_type"]["easy"] == {"exact_match": expected / 4, "samples": 4}
    assert result["by_type"]["hard"] == {"exact_match": 0.0, "samples": 4}


@pytest.mark.parametrize("template", [QWEN_CHAT, THINKING_CHAT])
def test_a_student_that_generates_what_it_was_trained_on_is_right(made, teacher, monkeypatch, template):
    """Where the template opens and inserts a thinking block, that is the end of the block and then the answer."""
    monkeypatch.setattr(teacher.encoder.processor, "chat_template", template)
    plan = plan_for(made.held_out)
    learnt = {}
    for raw in map(plan.data.read, plan.indices()):
        exchange = last_exchange(raw.record, raw.images)
        prompt = teacher.encoder.prompt(exchange.messages, exchange.images)["input_ids"][0]
        chat = teacher.encoder(raw.key, raw.record["messages"], raw.images)
        learnt[tuple(prompt.tolist())] = chat.inputs["input_ids"][0, chat.turns == chat.answer].tolist()

    def as_learnt(vlm, inputs, max_new_tokens):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        return [learnt[tuple(row[mask].tolist())] for row, mask in rows]

    monkeypatch.setattr(scoring, "greedy", as_learnt)
    result = score(teacher, plan)
    assert (result["exact_match"], result["wrong"], result["cut"]) == (1.0, [], 0)


def test_results_under_a_template_that_thinks_are_none_of_earlier_versions(made, tmp_path):
    """These compared the thinking block too, and found every answer wrong."""
    folder = shutil.copytree(made.root / "student", tmp_path / "student")
    assert "thinking" not in model_identity(folder)
    (folder / "chat_template.jinja").write_text(THINKING_CHAT)
    assert model_identity(folder)["thinking"] == "left out"


def test_answers_that_had_not_ended_are_counted_and_said(made, teacher, capsys):
    """Random weights hardly ever end an answer; the model's own first token as its stop id ends that answer at once."""
    plan = plan_for(made.held_out)
    ids = greedy(teacher, teacher.encoder.prompt(*asked_first(made)), 6)[0]
    assert len(ids) == 6 and ids[-1] not in teacher.stop_ids()
    never = score(teacher, plan)
    assert never["cut"] == never["samples"] == 10
    before = teacher.model.generation_config.eos_token_id
    teacher.model.generation_config.eos_token_id = ids[0]
    try:
        ended = score(teacher, plan)
    finally:
        teacher.model.generation_config.eos_token_id = before
    assert ended["samples"] - ended["cut"] > 0
    show({"one": never, "two": never | {"cut": 0}}, plan)
    said = " ".join(capsys.readouterr().out.split())
    assert "one: 10 of 10 answers were cut at --max-new-tokens 6," in said and "two: 10 of" not in said
    assert "not to be compared" not in said
    show({"one": never, "two": never | {"response_tokens": 1}}, plan)
    assert "perplexity: not to be compared" in " ".join(capsys.readouterr().out.split())


def asked_first(made):
    raw = ShardFolder(made.held_out).read(0)
    exchange = last_exchange(raw.record, raw.images)
    return exchange.messages, exchange.images


def test_read_equals_used_plus_rejected(tmp_path, teacher):
    good = chats(4)
    broken = ("broken", {**good[0][1], "id": "broken"}, [b"no image"])
    long = turn("user", "x" * 600)
    too_long = ("long", {**good[0][1], "messages": [long, turn("assistant", "a")]}, [])
    folder = write_shards(tmp_path / "held_out", [*good, broken, too_long])
    result = score(teacher, plan_for(folder, batch_size=3))
    assert (result["read"], result["samples"]) == (6, 4)
    assert [one["key"] for one in result["rejected"]] == ["broken", "long"]
    assert "cannot be decoded" in result["rejected"][0]["reason"]
    assert "max_length is 512" in result["rejected"][1]["reason"]
    assert result["rejected"][1]["shard"] == "000000.tar"


def test_a_flipped_bit_costs_one_sample(tmp_path, teacher):
    folder = write_shards(tmp_path / "held_out", chats(5))
    flip_a_bit(folder, 2)
    result = score(teacher, plan_for(folder))
    assert (result["read"], result["samples"]) == (5, 4)
    assert [(one["key"], "do not match their checksum" in one["reason"]) for one in result["rejected"]] == [
        (chats(5)[2][0], True)
    ]
    plan = plan_for(folder)
    assert score_question_only(plan, plan.data)["samples"] == 4


def test_too_many_bad_samples_end_an_evaluation(tmp_path, teacher):
    """An image that the processor refuses is a bad sample. At max_bad_share 0.01 one is tolerated, two are not."""
    (_, record, _), good = chats(1)[0], chats(3)
    long = png(size=(2001, 10))
    folder = write_shards(tmp_path / "held_out", [*good, ("long", record, [long])])
    result = score(teacher, plan_for(folder, limits=limits(max_bad_share=0.01)))
    assert [one["reason"] for one in result["rejected"]] == [
        "the model's processor refused it: ValueError: absolute aspect ratio must be smaller than 200, got 200.1"
    ]
    folder = write_shards(tmp_path / "worse", [*good, ("long", record, [long]), ("longer", record, [long])])
    with pytest.raises(DataError, match=r"2 of 5 samples could not be used, .*; the last: longer in 000000.tar: .*"):
        score(teacher, plan_for(folder, limits=limits(max_bad_share=0.01)))


def test_a_batch_of_bad_samples_alone_is_survived(tmp_path, teacher):
    record = chats(1)[0][1]
    folder = write_shards(tmp_path / "held_out", [("a", record, [b"no"]), ("b", record, [b"image"])])
    result = score(teacher, plan_for(folder))
    assert (result["samples"], result["perplexity"], len(result["rejected"])) == (0, None, 2)
    assert response_loss(teacher, []) == (0.0, 0)


def test_a_run_compares_its_models_and_writes_json(made, tmp_path):
    output = tmp_path / "deep" / "evaluation.json"
    plan = make_plan([f"again={made.root}/student"], made.run, None, None, output, **SIZES | {"limit": 5})
    results = evaluate(plan)
    assert list(results) == ["teacher", "untouched", "distilled", "again", "question_only"]
    assert json.loads(output.read_text()) == results
    same = ("exact_match", "perplexity", "samples", "by_type")
    assert [results["again"][key] for key in same] == [results["untouched"][key] for key in same]
    assert results["teacher"]["perplexity"] != results["untouched"]["perplexity"]
    assert results["question_only"]["samples"] == results["teacher"]["samples"] == 5
    assert results["question_only"]["learnt_from"].endswith("train")


def test_a_limit_takes_samples_over_the_whole_data(made):
    """data_prep keeps the input's order, and that is often by question type."""
    plan = plan_for(made.held_out, limit=4)
    assert list(plan.indices()) == [0, 2, 5, 7] and plan.samples() == "4 evenly spaced"
    for limit in (None, 10, 99):
        whole = plan_for(made.held_out, limit=limit)
        assert list(whole.indices()) == list(range(10)) and whole.samples() == "10", "results of all stay"
    assert evenly_spaced(7, 3) == [0, 2, 4] and evenly_spaced(5, 1) == [0]


def test_question_only_learns_from_the_sibling_of_the_held_out_data(tmp_path):
    def asked(answer):
        return [turn("user", "<image>", "colour?"), turn("assistant", answer)]

    base = chats(1)[0][1]
    train = [(f"t{i}", {**base, "messages": asked(a)}, [png()]) for i, a in enumerate(("red", "red", "blue"))]
    held = [(f"h{i}", {**base, "messages": asked(a)}, [png()]) for i, a in enumerate(("Red.", "blue"))]
    write_shards(tmp_path / "train", train)
    data = write_shards(tmp_path / "held_out", held)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    plan = make_plan([str(tmp_path / "m")], None, data, None, None, **SIZES)
    assert plan.baseline is not None and plan.baseline.path == tmp_path / "train"
    assert score_question_only(plan, plan.baseline)["exact_match"] == 0.5


def test_a_folders_name_is_its_models_name_and_names_must_differ(made):
    folder = str(made.root / "teacher")
    plan = make_plan([folder, f"other={folder}"], None, made.held_out, None, None, **SIZES)
    assert list(plan.models) == ["teacher", "other"]
    with pytest.raises(RecipeError, match="two models have one name"):
        make_plan([folder, folder], None, made.held_out, None, None, **SIZES)


@pytest.mark.parametrize(
    ("models", "run", "data", "message"),
    [
        ([], None, "held_out", r"nothing to evaluate: give --model DIR .* or --run RUN"),
        (["teacher"], None, None, r"no data: give --data SHARDS"),
        (["nowhere"], None, "held_out", r"no model in .*nowhere: expected a Hugging Face folder"),
        (["question_only=teacher"], None, "held_out", "cannot be named question_only"),
        ([], "shards", None, r"shards is no run: expected .* recipe.yaml"),
    ],
)
def test_mistakes_are_answered_before_a_model_is_loaded(made, models, run, data, message):
    models = [m.replace("teacher", f"{made.root}/teacher").replace("nowhere", f"{made.root}/nowhere") for m in models]
    with pytest.raises(RecipeError, match=message):
        make_plan(models, run and made.root / run, data and made.root / "shards" / data, None, None, **SIZES)


def test_a_shard_folder_without_samples_is_refused(made, tmp_path):
    write_manifest(tmp_path, [], format=FORMAT, version=1, split="held_out")
    with pytest.raises(DataError, match="without a sample; python -m data_prep shard"):
        make_plan([str(made.root / "teacher")], None, tmp_path, None, None, **SIZES)


def test_typed_chats_give_types(made):
    types = {record["question_type"] for _, record, _ in typed(chats(4))}
    assert types == {"colour", "shape"}
