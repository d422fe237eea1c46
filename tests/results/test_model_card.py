"""The student's model card: what it says and where from, when it is written again, and what it keeps to itself."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from data_prep.shards import read_manifest, write_manifest
from pipeline.__main__ import main
from pipeline.runtime.folder import mark_done
from pipeline.runtime.model_card.base import model_facts
from pipeline.runtime.model_card.card import WRITTEN, model_card, write_card
from pipeline.runtime.versions import keep_environment, read_environment

RESULT = {"exact_match": 0.5, "low": 0.25, "high": 0.75, "samples": 1234, "read": 8, "perplexity": 2.0}


@pytest.fixture
def run(made, tmp_path):
    """A finished run whose base states its licence, and lies where no one else should read of it."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    base = tmp_path / "secret place" / "Base-2B"
    shutil.copytree(made.root / "student", base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: so-so\nlanguage: [en, ko]\n---\n# Base\n")
    recipe = (run / "recipe.yaml").read_text().replace(f"{made.root}/student", f"'{base}'")
    (run / "recipe.yaml").write_text(recipe.replace(f"run: {made.run}", f"run: {run}") + "train: [decoder]\n")
    mark_done(run / "interact", {"updates": 3})
    mark_done(run / "reinforce", {"updates": 0})
    return run


def evaluated(run, **models):
    found = {
        name: RESULT | {"model": str(folder), "data": f"{run.parent}/a/held_out"} for name, folder in models.items()
    }
    (run / "evaluation.json").write_text(json.dumps(found))


def test_it_says_what_the_runs_files_say(run):
    keep_environment(run, "interact", 4, "cpu")
    text = model_card(run)
    assert "Not evaluated when this was written" in text
    for said in ("Base-2B", "| licence | so-so |", "| interact | 3 updates of 4 samples |", "| reinforce | left out |"):
        assert said in text, said
    assert "12 samples, source `not stated`" in text and "train: [decoder]" in text and "layers: [1, 2]" in text
    assert "* 4 ranks on cpu" not in text, "complete steps keep the environment that they ran in"
    assert "2412.01822" in text


def test_it_says_how_large_samples_were_in_training(run):
    """The processor beside the card is the base's own, with the base's limits."""
    assert "| limits in training | chats of at most 512 tokens |" in model_card(run)
    assert "The processor is the base's own" not in model_card(run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["max_pixels"] = 1003520
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = model_card(run)
    assert "package torchvision.\n\nIn training, pictures" in text and ")`.\n\n## Evaluation" in text
    assert "chats of at most 512 tokens, pictures of at most 1,003,520 pixels |" in text
    assert '`AutoProcessor.from_pretrained("FOLDER_OR_NAME", max_pixels=1003520)`' in text


def test_data_that_a_model_answered_is_said_to_be(run, made, tmp_path):
    data = tmp_path / "answers" / "train"
    shutil.copytree(made.root / "shards" / "train", data)
    manifest = read_manifest(data)
    origin = {"data_provenance": {"source": "llava", "noise": 0.25, "input": "/secret/chats.json"}}
    kept = {name: manifest[name] for name in ("format", "version", "split")}
    write_manifest(data, manifest["shards"], **kept, answered=origin)
    recipe = (
        (run / "recipe.yaml")
        .read_text()
        .replace("reinforce: {steps: 3, batch_size: 4}", f"reinforce: {{steps: 3, batch_size: 4, train: {data}}}")
    )
    (run / "recipe.yaml").write_text(recipe)
    text = model_card(run)
    assert "`answers/train`: 12 samples, answers given by a model, source `llava`, noise 0.25" in text
    assert "secret" not in text.split("## Data")[1].split("## Training")[0]


def test_its_metadata_is_the_hubs(run):
    evaluated(run, untouched=run.parent / "x", mine=run / "student")
    card = ModelCard(model_card(run))
    data = card.data
    assert (data.license, data.license_name, data.language) == ("other", "so-so", ["en", "ko"])
    assert data.pipeline_tag == "image-text-to-text" and data.library_name == "transformers" and data.base_model is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("exact_match", 0.5, "a/held_out")
    assert "| **mine** (this model) | 50.0% | 25.0 to 75.0 | 2.000 | 1,234 |" in card.text
    assert "| untouched | 50.0% |" in card.text


def test_tables_and_lists_are_whole(run):
    """A blank line inside would end a table."""
    evaluated(run, untouched=run.parent / "x", mine=run / "student")
    blocks = model_card(run).split("\n\n")
    tables = [block for block in blocks if block.startswith("|")]
    assert [len(table.splitlines()) for table in tables] == [2 + 6, 2 + 2]


def test_perplexities_of_unlike_tokens_are_said_to_be_so(run):
    said = "do not compare them"
    evaluated(run, untouched=run.parent / "x", mine=run / "student")
    assert said not in model_card(run)
    file = run / "evaluation.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps({name: one | {"response_tokens": len(name)} for name, one in results.items()}))
    text = model_card(run)
    assert "| 2.000 | 1,234 |\n\nPerplexities are per token, and these models" in text and f"{said}.\n" in text
    file.write_text(json.dumps({name: one | {"response_tokens": 9} for name, one in results.items()}))
    assert said not in model_card(run)


def test_it_names_no_folder_of_the_machine(run):
    evaluated(run, mine=run / "student")
    text = model_card(run)
    assert str(run.parent) not in text and "secret place" not in text


def test_a_hub_snapshot_is_named_as_the_hub_does(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen2-VL-2B-Instruct" / "snapshots" / "895c3a49bc3fa70a340399125c650a463535e71c"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\n: [\n---\n")
    facts = model_facts(folder)
    assert (facts.title, facts.hub_name) == ("Qwen/Qwen2-VL-2B-Instruct at 895c3a49bc3f", "Qwen/Qwen2-VL-2B-Instruct")
    assert facts.licence == "not stated by the base"
    assert model_facts(tmp_path / "gone" / "student").title == "gone/student"


def test_it_is_written_again_until_it_is_someones_own(run):
    folder = run / "student"
    shutil.copy(run.parent / "secret place" / "Base-2B" / "README.md", folder)
    assert write_card(run, folder), "the base's, copied along, is no card of the student"
    evaluated(run, mine=folder)
    assert write_card(run, folder) and "1,234" in (folder / "README.md").read_text()
    own = (folder / "README.md").read_text().replace(WRITTEN, "").replace("1,234", "many")
    (folder / "README.md").write_text(own)
    assert not write_card(run, folder) and (folder / "README.md").read_text() == own


def test_evaluate_writes_it_with_its_results(run):
    assert main(["evaluate", "--run", str(run), "--without-teacher", "--limit", "2", "--max-new-tokens", "2"]) == 0
    text = (run / "student" / "README.md").read_text()
    assert "**distilled** (this model)" in text and "Wilson" in text


def test_a_complete_step_keeps_the_environment_it_ran_in(tmp_path):
    keep_environment(tmp_path, "verbalize", 2, "cpu")
    first = read_environment(tmp_path, "verbalize")
    assert first["ranks"] == 2 and first["device"] == "cpu" and first["packages"]["torch"] and first["commit"]
    keep_environment(tmp_path, "verbalize", 3, "cpu")
    assert read_environment(tmp_path, "verbalize")["ranks"] == 3, "it went on"
    mark_done(tmp_path / "verbalize", {})
    keep_environment(tmp_path, "verbalize", 9, "cpu")
    assert read_environment(tmp_path, "verbalize")["ranks"] == 3
    assert read_environment(tmp_path, "cache") is None


def test_a_url_is_named_as_a_folder_is(run):
    """A run that trained from a bucket could not write its card, so it never ended."""
    with (run / "recipe.yaml").open("a") as file:
        file.write("cache: {folder: 's3://secret-bucket/caches'}\n")
    text = model_card(run)
    assert "folder: caches" in text and "secret-bucket" not in text


def test_the_recipe_in_it_is_a_recipe(run):
    block = model_card(run).split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["student"]["path"] == "Base-2B"
