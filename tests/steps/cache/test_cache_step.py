"""The cache step around the teacher: what is told, what is shared out, and what a failure leaves behind."""

from __future__ import annotations

import resource
from contextlib import ExitStack, contextmanager
from threading import Timer

import pytest
import torch
from random_teacher_pass import TOKENS, cache_of, encode_response, loaded, shard_batches
from running import tiny_recipe
from tiny import write_data

from data_prep.shards import ShardFolder
from pipeline.cache.fingerprint import compare
from pipeline.cache.reader import mismatches
from pipeline.errors import CacheError, DataError, SampleError, StorageError
from pipeline.recipe.resolve import load_recipe
from pipeline.runtime import shared_files
from pipeline.runtime.data.bad_samples import BadSamples, Rejected
from pipeline.runtime.folder import done, mark_done, read_metrics
from pipeline.runtime.loop import Job
from pipeline.runtime.ranks import Ranks
from pipeline.steps import teacher_cache
from pipeline.steps.cache import step
from pipeline.steps.cache.estimate import SizeEstimate
from pipeline.steps.cache.step import _Log
from pipeline.steps.cache.writing import ShardBatch, WriterThread, WrittenBatch
from pipeline.vlm.chat_template import ChatTemplate


@pytest.fixture
def data(tmp_path):
    return ShardFolder(write_data(tmp_path / "train", 12, shards=3))


@pytest.fixture
def job(tmp_path, tiny_models, data):
    return Job(load_recipe(tiny_recipe(tmp_path, tiny_models, "qwen2_vl", data.path)).recipe, Ranks())


@contextmanager
def files_of_at_most(size: int):
    """A disk that is full, as far as this process sees: no file may grow larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(cache, data, shards):
    with WriterThread(cache) as writing:
        written = []
        for shard in shards:
            for shard_batch in shard_batches(data, shard):
                written += writing.put(shard_batch, encode_response(shard_batch.loaded, cache.codec()))
        return written + writing.rest()


def test_a_disk_that_fills_up_ends_the_job_plainly_and_leaves_whole_shards_alone(tmp_path, data):
    cache = cache_of(tmp_path / "cache", data)
    fill(cache, data, [0])
    before = {path.name: path.read_bytes() for path in cache.path.iterdir()}
    with files_of_at_most(1000), pytest.raises(CacheError) as raised:
        fill(cache, data, [1, 2])
    said = str(raised.value)
    assert said.startswith(f"{cache.path}: cannot write there: ") and "File too large" in said
    assert said.endswith("run the same command again: shards that are whole stay")
    assert {path.name: path.read_bytes() for path in cache.path.iterdir()} == before
    assert list(cache.missing(verify=True)) == ["000001.tar", "000002.tar"]
    fill(cache, data, [1, 2])
    assert not cache.missing(verify=True)


def test_an_error_of_packing_is_raised_and_the_shard_in_hand_is_dropped(tmp_path, data, monkeypatch):
    cache = cache_of(tmp_path / "cache", data)
    codec = cache.codec()

    def pack(arrays):
        raise ZeroDivisionError("of the codec")

    monkeypatch.setattr(codec, "pack", pack)
    monkeypatch.setattr(cache, "codec", lambda: codec)
    with pytest.raises(ZeroDivisionError, match="of the codec"):
        fill(cache, data, [0, 1, 2])
    assert [path.name for path in cache.path.iterdir()] == ["cache.json"]


def test_what_is_told_is_true_where_the_other_ranks_have_nothing_to_do(tmp_path, data, job, capsys):
    cache = cache_of(tmp_path / "cache", data)
    written = fill(cache, data, [0])
    estimate = SizeEstimate(token_layers=1.0, bytes=float(sum(one.bytes for one in written)))
    with ExitStack() as stack:
        log = _Log(Job(job.recipe, Ranks(0, world=8)), stack, "some-1", 4, estimate)
        log.written(written[:1])
        assert log.progress.done == 2, "half of the way, and not 8 times as far"
        log.written([])
        log.written(written[1:])
    told = capsys.readouterr().out.splitlines()
    size = f"{estimate.bytes / 1000:.1f} KB"
    assert len(told) == 2 and "cache  2/4  eta" in told[0]
    assert "cache  4/4" in told[1] and f"{size} of about {size}" in told[1]
    (line,) = read_metrics(job.recipe.run, "cache")
    assert (line["update"], line["cache"], line["tokens"]) == (1, "some-1", 4 * TOKENS)
    assert line["bytes"] == estimate.bytes


def test_all_ranks_count_together(tmp_path, data, job, monkeypatch):
    written = fill(cache_of(tmp_path / "cache", data), data, [0])
    monkeypatch.setattr(step, "sum_over_ranks", lambda counts: counts * 3)  # three ranks that do alike
    with ExitStack() as stack:
        log = _Log(job, stack, "some-1", 12, SizeEstimate(1.0, 1.0))
        log.written(written)
    assert log.progress.done == 12 and log.tokens == 12 * TOKENS
    assert [line["update"] for line in read_metrics(job.recipe.run, "cache")] == [3]


def test_bad_samples_are_counted_over_all_ranks(tmp_path, data, job, monkeypatch):
    """Two bad samples of this rank's four are two of 200 for the job; eleven stop every rank, whosever they are.

    The share of each rank alone stopped it, and the others waited for it in the next collective.
    """
    both = SampleError("image cannot be decoded")
    first = data.shards[0]
    bad = [Rejected.of(data, index, both) for index in (0, 1)]
    batch = ShardBatch(first.name, loaded(data.keys[2:4], tuple(bad)), True)
    written = [WrittenBatch(batch, 1, bad)]
    others: list[Rejected] = []
    own = torch.tensor(written[0].counts())

    def summed(counts):
        return counts + torch.tensor([196, 0, 0, 0, 0] if torch.equal(counts, own) else [0, 0, 0, 0, 9])

    monkeypatch.setattr(step, "sum_over_ranks", summed)
    monkeypatch.setattr(step, "gather_lists", lambda items: [*items, *others])
    with ExitStack() as stack:
        log = _Log(job, stack, "some-1", 12, SizeEstimate(1.0, 1.0))
        log.written(written)
        assert (log.bad.read, log.bad.rejected) == (200, 2)
        others += [Rejected(f"other{number}", "000002.tar", "no picture") for number in range(9)]
        with pytest.raises(DataError, match="11 of 200 samples .*; the last: other8 in 000002.tar: no picture"):
            log.written([])
    assert len((job.recipe.run / "rejects.jsonl").read_text().splitlines()) == 11, "rank 0 lists those of all ranks"


def test_a_cache_that_many_jobs_made_is_not_finished_with_too_many_bad_samples(tmp_path, data):
    sidecars = [{"samples": 100, "skipped": {f"{shard}{n}": "broken" for n in range(2)}} for shard in range(2)]
    with pytest.raises(DataError, match="4 of 200 samples could not be used, more than data.max_bad_share=0.01"):
        step._summary(BadSamples(0.01), sidecars)


def test_the_reasons_why_shards_are_made_are_said_the_rarest_first(job, capsys):
    absent = {f"{number:06d}.tar": "not made yet" for number in range(100)}
    step._say_why(job, absent | {"000007.tar": "changed: expected SHA-256 aa, found bb"})
    assert capsys.readouterr().out.splitlines() == [
        "cache: 000007.tar: changed: expected SHA-256 aa, found bb",
        "cache: 000000.tar and 98 more: not made yet",
    ]
    step._say_why(job, {f"{number:06d}.tar": f"changed: found {number}" for number in range(8)})
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "cache: 000004.tar: changed: found 4",
        "cache: 3 more shards, for other reasons",
    ]


def test_shards_are_verified_by_all_ranks_each_its_own(tmp_path, data, job, monkeypatch):
    cache = cache_of(tmp_path / "cache", data)
    fill(cache, data, [0, 1, 2])
    (cache.path / "000001.tar").write_bytes(b"x" * (cache.path / "000001.tar").stat().st_size)
    looked = []
    missing = cache.missing
    monkeypatch.setattr(cache, "missing", lambda names, verify: looked.append(list(names)) or missing(names, verify))

    def both_ranks(asking, what, look):
        return [item for rank in (0, 1) for item in looks[rank]()]

    looks = {}
    monkeypatch.setattr(
        step, "gather_when_ready", lambda asking, what, look: looks.update({asking.rank: look}) or [(set(), {})]
    )
    for rank in (0, 1):
        step._work(Job(job.recipe, Ranks(rank, 2)), cache, data, None, True)
    monkeypatch.setattr(step, "gather_when_ready", both_ranks)
    missing_files, why = step._work(Job(job.recipe, Ranks(0, 2)), cache, data, None, True)
    assert looked == [["000000.tar", "000002.tar"], ["000001.tar"]] and not missing_files
    assert list(why) == ["000001.tar"] and why["000001.tar"].startswith("changed: expected SHA-256")


def test_a_job_that_ends_while_another_completes_the_cache_leaves_its_mark(tmp_path, data, job, monkeypatch):
    cache = cache_of(job.recipe.run / "cache" / "topk-1", data)
    fill(cache, data, [0, 1])
    finish = cache.finish

    def and_then_another_job_completes(summary):
        complete = finish(summary)
        fill(cache, data, [2])
        assert finish(summary)
        mark_done(job.recipe.run / "cache", {"folder": "topk-1"})
        return complete

    monkeypatch.setattr(cache, "finish", and_then_another_job_completes)
    step._finish(job, cache, 3, [])
    assert done(job.recipe.run / "cache") == {"folder": "topk-1"}


def test_rank_0_waits_for_the_shards_that_it_does_not_see_yet(tmp_path, data, job, monkeypatch):
    """Over NFS another host's last shard shows late: the cache was left without a manifest, and nobody completed it."""
    cache = cache_of(job.recipe.run / "cache" / "topk-1", data)
    fill(cache, data, [0, 1, 2])
    late, aside = cache.path / "000002.json", tmp_path / "late"
    late.rename(aside)
    monkeypatch.setattr(shared_files, "POLL_S", 0.01)
    with monkeypatch.context() as impatient:
        impatient.setattr(shared_files, "WAIT_S", 0.02)
        with pytest.raises(StorageError, match="000002.tar: written by another rank of this job, but rank 0 sees: not"):
            step._finish(job, cache, 3, ["000002.tar"])
    timer = Timer(0.3, lambda: aside.rename(late))
    timer.start()
    step._finish(job, cache, 3, ["000002.tar"])
    timer.join()
    assert done(job.recipe.run / "cache")["shards"] == 3


def test_without_verbalizers_the_command_is_the_runs_own(job):
    with pytest.raises(CacheError, match="no verbalizers in .*run/verbalize; run: deepspeed launch/train.py") as raised:
        step.run(job)
    assert str(raised.value).endswith(f"--stage 1 --recipe {job.recipe.run / 'recipe.yaml'} --only verbalize")


def test_only_rank_0_hashes(job, monkeypatch):
    hashed = []
    monkeypatch.setattr(step, "files_fingerprint", lambda files, _: hashed.append(files) or "aa")
    monkeypatch.setattr(
        step, "teacher_fingerprints", lambda folder, template, _: hashed.append(folder) or {"weights": "bb"}
    )
    made = {}
    monkeypatch.setattr(
        step, "gather_when_ready", lambda asking, what, make: made.update({asking.rank: make()}) or [{}]
    )
    encoder = step.encoders(job.recipe, ["teacher"])["teacher"]
    for rank in (0, 1):
        verbalize = {"vocab": 20, "teacher": {"layers": [1, 2], "depth": 6}}
        step._identity(Job(job.recipe, Ranks(rank, 2)), verbalize, encoder)
    assert made[0][0]["weights"] == "bb" and made[1] == [] and len(hashed) == 2


@pytest.mark.parametrize(("made", "wanted"), [(3136, None), (None, 3136), (3136, 6272)])
def test_a_cache_of_pictures_of_another_size_is_refused_either_way(job, made, wanted):
    """Also where the recipe no longer has the limit that the cache was made under."""
    mark_done(job.recipe.run / "verbalize", {})
    (job.recipe.run / "verbalize" / "teacher.safetensors").write_bytes(b"")
    verbalize = {"vocab": 20, "teacher": {"layers": [1, 2], "depth": 6}}

    def under(limit):
        data = job.recipe.data.model_copy(update={"max_pixels": limit})
        return Job(job.recipe.model_copy(update={"data": data}), Ranks())

    encoder = step.encoders(job.recipe, ["teacher"])["teacher"]
    identity = step._identity(under(made), verbalize, encoder)
    assert mismatches(identity, teacher_cache._expected(under(made).recipe), None) == []
    said = [str(one) for one in mismatches(identity, teacher_cache._expected(under(wanted).recipe), None)]
    assert said == [f"pixels: expected any to {wanted or 'any'}, found any to {made or 'any'}"]


def test_a_cache_of_chats_with_two_bos_tokens_is_not_one_of_chats_with_one(job, monkeypatch):
    """Both where a cache is made and where it is asked for."""
    mark_done(job.recipe.run / "verbalize", {})
    (job.recipe.run / "verbalize" / "teacher.safetensors").write_bytes(b"")
    encoder = step.encoders(job.recipe, ["teacher"])["teacher"]
    verbalize = {"vocab": 20, "teacher": {"layers": [1, 2], "depth": 6}}

    def identities():
        return step._identity(job, verbalize, encoder).fingerprints, teacher_cache._expected(job.recipe)

    before, asked_before = identities()
    monkeypatch.setattr(ChatTemplate, "fingerprint_of_bos", lambda self, name="bos": {name: "one"})
    now, asked = identities()
    assert now == {**before, "bos": "one"} and asked == {**asked_before, "bos": "one"}
    assert [str(one) for one in compare(asked, before)][-1] == "bos: expected one, found none recorded"
