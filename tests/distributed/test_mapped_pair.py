"""Two models with different byte-pair tables through both stages, on two ranks: vocabulary: mapped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bpe_tokenizers import ENGLISH, OTHER, bpe_tokenizer
from running import cache_folder, deepspeed, tiny_recipe
from tiny import png, write_data, write_vlm

from data_prep.shards import ShardFolder
from pipeline.__main__ import main
from pipeline.cache.reader import TeacherCache
from pipeline.errors import CacheError, RecipeError
from pipeline.loss.bucket import BUCKET_FLOOR
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime.data.batches import DataOrder, derived_seed
from pipeline.runtime.loop import Job
from pipeline.runtime.ranks import Ranks
from pipeline.steps.teacher_cache import check_for_another_student
from pipeline.vlm.assemble import encoders, mapped_vocabulary, shared_vocabulary
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.mapped_pair import MappedPair
from pipeline.vlm.processing import collate

KIND, ROLES = "qwen2_vl", ("teacher", "student")
SAMPLES = 24


class Finished:
    """A whole run. The first stage is refused once, for its bucket, and stage 2 has no teacher's folder."""

    def __init__(self, folder: Path):
        data = write_data(folder / "train", SAMPLES, shards=3)
        made = {"teacher": (6, bpe_tokenizer(ENGLISH, 300)), "student": (3, bpe_tokenizer(OTHER, 290, end="</s>"))}
        models = {
            (KIND, role): write_vlm(folder / role, KIND, layers, 32, seed=layers, tokenizer=tokenizer, rows=352)
            for role, (layers, tokenizer) in made.items()
        }
        where = tiny_recipe(folder, models, KIND, data, vocabulary="mapped", verbalize={"steps": 6})
        self.folder, self.run, self.data = folder, folder / "run", ShardFolder(data)
        self.refused = deepspeed(2, "train.py", "--stage", 1, "--recipe", where, check=1)
        self.left_by_refusal = sorted(file.name for file in cache_folder(self.run).iterdir())
        allowed = ["--set", "cache.max_bucket_share=0.5"]
        self.said = deepspeed(2, "train.py", "--stage", 1, "--recipe", where, *allowed)
        (folder / "teacher").rename(folder / "gone")
        self.said += deepspeed(2, "train.py", "--stage", 2, "--recipe", where, *allowed)
        (folder / "gone").rename(folder / "teacher")
        self.recipe = load_recipe(self.run / "recipe.yaml").recipe
        self.encoders = encoders(self.recipe, ROLES)
        self.pair = MappedPair(self.encoders["teacher"], self.encoders["student"])
        self.map = mapped_vocabulary(self.recipe, self.pair)
        self.cache = TeacherCache(cache_folder(self.run), self.data)

    def aligned(self, sample: int):
        """(teacher's form, student's form, record) of a sample, supervised at the same tokens."""
        raw = self.data.read(sample)
        both = [self.encoders[role](raw.key, raw.record["messages"], raw.images) for role in ROLES]
        return self.pair.align(*both)

    def logits(self, role: str, samples, vocab: int) -> torch.Tensor:
        """[T, V] float64: what the untouched model's last layer says where the supervised tokens are predicted."""
        encoded = [self.aligned(sample)[ROLES.index(role)] for sample in samples]
        batch = collate(encoded, self.encoders[role].filler(), 0)
        model = load_vlm(self.folder / role, torch.float32).eval()
        with torch.no_grad():
            return model(**batch.inputs).logits.flatten(0, 1)[batch.positions, :vocab].double()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    return Finished(tmp_path_factory.mktemp("mapped"))


def test_a_bucket_that_is_too_large_is_refused_before_a_shard_is_made(finished):
    assert "expected at most cache.max_bucket_share=0.1." in finished.refused
    assert "tokens of samples spread over the data: the bucket has 11." in finished.refused
    assert "--set cache.max_bucket_share=0.12" in finished.refused
    assert finished.left_by_refusal == ["cache.json", "mapping.int32", "order.int32"]
    assert "mapped vocabulary: 274 of the teacher's 309 ids mean one of the student's 299" in finished.refused


def test_the_manifest_has_the_buckets_share(finished):
    """Against the teacher itself, in this process: its softmax over all its ids, summed over those not mapped."""
    manifest = json.loads((finished.cache.path / "manifest.json").read_text())
    probs = finished.logits("teacher", range(SAMPLES), len(finished.map.class_of)).softmax(-1)
    share = probs[:, finished.map.class_of == finished.map.bucket].sum(-1)
    assert manifest["bucket"]["tokens"] == manifest["tokens"] == len(share)
    assert len(manifest["bucket"]["layers"]) == len(manifest["layers"]) == 5
    assert manifest["bucket"]["layers"][-1] == pytest.approx(float(share.mean()), rel=1e-5)
    whole = sum(int(finished.aligned(sample)[2].places[-1]) for sample in range(SAMPLES))
    assert manifest["response_tokens"] == whole > manifest["tokens"]
    assert manifest["fingerprints"]["mapping"] == finished.map.digest and manifest["vocab"] == 300
    assert f"{share.mean():.2%} of the teacher's probability is in the bucket" in finished.said


def test_a_record_is_for_the_tokens_that_both_predict_after_the_same_text(finished):
    texts = finished.pair.texts[1]
    for sample in range(SAMPLES):
        teacher, student, expected = finished.aligned(sample)
        record = finished.cache.read(sample)
        assert np.array_equal(record.tokens, expected.tokens) and np.array_equal(record.places, expected.places)
        assert len(teacher.response_ids) == len(student.response_ids) == len(record.tokens)
        assert texts[int(record.tokens[-1])] == b"\xffend"


def test_interaction_begins_with_the_kl_over_the_mapped_ids_and_the_bucket(finished):
    """The logged loss of the last layer, against the untouched student and the naive formula in float64."""
    order = DataOrder(SAMPLES, derived_seed(finished.recipe.seed, "interact"))
    samples = [order[position].sample for position in range(finished.recipe.interact.batch_size)]
    signal = finished.cache.signal([finished.cache.read(sample) for sample in samples], [6])
    log_q = finished.logits("student", samples, finished.map.bucket).log_softmax(-1)
    p, bucket = signal.probs[:, 0].double(), signal.bucket.mass[:, 0].double()
    mapped = (p * log_q.gather(1, signal.ids[:, 0])).sum(-1)
    outside = log_q[:, signal.bucket.outside].exp().sum(-1).clamp_min(BUCKET_FLOOR).log()
    kl = signal.neg_entropy[:, 0].double() - mapped - bucket * outside
    assert torch.allclose(p.sum(-1) + bucket, torch.ones_like(bucket)) and bucket.max() > 0
    lines = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    first, *_ = interact = [line for line in lines if line["step"] == "interact"]
    assert first["tokens"] == len(kl) and first["last"] == pytest.approx(float(kl.mean()), abs=2e-6)
    assert all(np.isfinite([line["layer/1"], line["layer/2"], line["last"]]).all() for line in interact)
    reinforce = [line for line in lines if line["step"] == "reinforce"]
    assert reinforce[-1]["cross_entropy"] < reinforce[0]["cross_entropy"] - 0.2


def test_another_run_borrows_its_cache_and_trains_the_same_student(finished, tmp_path):
    """The same student once more, without the teacher's weights: to the bit what was trained beside the teacher."""
    weightless = tmp_path / "teacher"
    shutil.copytree(finished.folder / "teacher", weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    own = [f"run={tmp_path / 'run'}", f"cache_from={finished.run}", f"teacher.path={weightless}"]
    said = deepspeed(2, "train.py", "--stage", 1, "--recipe", finished.run / "recipe.yaml", "--set", *own)
    assert f"cache: that of {finished.run}" in said and not (tmp_path / "run" / "cache").exists()
    deepspeed(2, "train.py", "--stage", 2, "--recipe", tmp_path / "run" / "recipe.yaml")
    for name in ("verbalize/student.safetensors", "student/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.run / name).read_bytes(), name


def test_a_student_of_another_tokenizer_is_refused_the_cache(finished, tmp_path):
    other = write_vlm(tmp_path / "student", KIND, 3, 32, tokenizer=bpe_tokenizer(OTHER, 280, end="</s>"), rows=352)
    settings = [f"run={tmp_path / 'run'}", f"cache_from={finished.run}", f"student.path={other}"]
    job = Job(load_recipe(finished.run / "recipe.yaml", settings).recipe, Ranks())
    with pytest.raises(
        CacheError, match="(?s)student_tokenizer: expected .*one tokenizer and chat template of students"
    ):
        check_for_another_student(job, "verbalize", finished.data, 299, finished.map)


def test_a_student_of_the_same_tokenizer_with_fewer_rows_is_refused_the_cache(finished, tmp_path):
    settings = [f"run={tmp_path / 'run'}", f"cache_from={finished.run}"]
    job = Job(load_recipe(finished.run / "recipe.yaml", settings).recipe, Ranks())
    fewer = finished.pair.vocabulary_map(len(finished.map.class_of), 290)
    with pytest.raises(CacheError, match=r"another map .* student's 299; .* This student has .* student's 290; "):
        check_for_another_student(job, "verbalize", finished.data, fewer.bucket, fewer)


def test_commands_read_a_mapped_run(finished, capsys):
    def say(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return f"{code or 0} {' '.join((out.out + out.err).split())}"

    assert say("status", finished.run).startswith("0 ")
    told = say("cache-info", finished.run)
    assert "mean of the teacher's probability in it, on 48 tokens" in told and "48 supervised of " in told
    assert "mapped: the student's 299 ids, and one bucket" in told
    sample = say("cache-info", finished.run, "--sample", "s00003")
    assert "2 supervised response tokens" in sample and "Words may be wrong" not in sample
    assert "3 shards: 24 records" in say("cache-info", finished.run, "--verify")
    assert (
        "--suspects: " in (refused := say("cache-info", finished.run, "--suspects")) and "vocabulary: mapped" in refused
    )
    (finished.folder / "a.png").write_bytes(png(seed=1))
    asked = ["--image", finished.folder / "a.png", "--question", "what?", "--max-new-tokens", 2]
    traced = say("trace", "--run", finished.run, *asked)
    assert traced.startswith("0 ") and all(name in traced for name in ("teacher", "untouched", "distilled"))
    machine = ["--gpus", 2, "--gpu-memory", 80]
    assert say("plan", "--recipe", finished.run / "recipe.yaml", *machine).startswith("0 ")
    assert say("report", finished.run).startswith("0 ")


def test_a_shared_vocabulary_is_refused_for_this_pair(finished):
    with pytest.raises(RecipeError, match=r"token 256 is 'ab' to the teacher and 'th' to .*vocabulary: mapped"):
        shared_vocabulary(finished.recipe, finished.encoders)
