"""Stage 1b: one pass of the teacher over the data; its layers' distributions at response tokens go to disk.

Each rank makes whole shards, so nothing is gathered; batches are formed within a shard, so that a shard's bytes do not
depend on the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.shards import ShardFolder
from data_prep.storage import listed
from pipeline.cache.find import folder_for
from pipeline.cache.fingerprint import files_fingerprint, sample_fingerprints, teacher_fingerprints
from pipeline.cache.hashes import HashStore, check_sha256
from pipeline.cache.layout import CacheIdentity, codec_params
from pipeline.cache.mapping import MAPPING
from pipeline.cache.order import ORDER
from pipeline.cache.paths import IDENTITY
from pipeline.cache.writer import CacheFolder
from pipeline.commands import train_command
from pipeline.errors import CacheError, StorageError
from pipeline.loss.bucket import BucketShare
from pipeline.loss.fidelity import Fidelity
from pipeline.recipe.resolve import own_caches
from pipeline.runtime.data.bad_samples import BadSamples
from pipeline.runtime.data.batches import ChatDataset
from pipeline.runtime.display.progress import StepProgress, size_text
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.faults import watch
from pipeline.runtime.folder import done, ids_of, mark_done
from pipeline.runtime.loop import Job, record_rejected
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.ranks import (
    gather_lists,
    gather_when_ready,
    of_first_rank,
    on_first_rank,
    sum_over_ranks,
    until_all_done,
    wait_for_all,
)
from pipeline.runtime.shared_files import as_first_rank_sees, wait_for_files, wait_until
from pipeline.steps.cache.estimate import SizeEstimate, check_disk_space, find_vocabulary_order, rehearse
from pipeline.steps.cache.keeping_up import KeepingUp, Waited
from pipeline.steps.cache.mapped import MappedCache, bucket_summary, check_bucket, mapped_cache
from pipeline.steps.cache.teacher_pass import TeacherPass
from pipeline.steps.cache.writing import WriterThread, WrittenBatch, plan, shard_batches
from pipeline.vlm.assemble import encoders, load_trained
from pipeline.vlm.cohost import CoHost
from pipeline.vlm.mapped_pair import align_teacher
from pipeline.vlm.probe import check_parts
from pipeline.vlm.processing import ChatEncoder

NAME = "cache"

STOPPED = f"{NAME}: stopped; the shards that are whole stay"
REASONS_SAID = 5
"""How many of the reasons why shards are to be made are said."""


def run(
    job: Job, hosted: Engine | None = None, shards: tuple[int, int] | None = None, only_missing: bool = False
) -> None:
    """Make the missing cache shards, of all or of a range. Shards that exist stay.

    hosted: stage 1's engine, which holds the teacher already. only_missing: hash the shards that exist, and make again
    those that have changed.
    """
    recipe = job.recipe
    verbalize = _verbalizers(job)
    made = encoders(recipe, ["teacher"] if recipe.vocabulary == "shared" else ["teacher", "student"])
    data, mapped = ShardFolder(recipe.data.train), mapped_cache(recipe, made)
    cache = _open(job, _identity(job, verbalize, made["teacher"], mapped), data)
    missing_files, missing = _work(job, cache, data, shards, only_missing)
    if missing or missing_files:
        _say_why(job, missing)
        if hosted is None:
            _check_verbalizers(job, verbalize)
        engine = hosted or load_teacher(job, ids_of(verbalize, "teacher"), made["teacher"])
        teacher_pass = _teacher_pass(job, engine, data, made["teacher"], cache.identity, mapped)
        _prepare(job, teacher_pass, cache, missing_files, mapped)
        _, missing = _work(job, cache, data, shards, only_missing) if missing_files else (missing_files, missing)
        if missing:
            _fill(job, teacher_pass, cache, list(missing))
    wait_for_all()
    on_first_rank(
        job.ranks, f"{NAME}: writing the manifest", lambda: _finish(job, cache, len(data.shards), list(missing))
    )


def _verbalizers(job: Job) -> dict[str, Any]:
    """The summary of step verbalize, as rank 0 sees it."""
    run = job.recipe.run
    summary = of_first_rank(done(run / "verbalize") if job.ranks.first else None)
    if summary is None:
        again = train_command(1, run / "recipe.yaml", "--only", "verbalize")
        raise CacheError(f"no verbalizers in {run / 'verbalize'}; run: {again}")
    return summary


def _teacher_pass(
    job: Job,
    engine: Engine,
    data: ShardFolder,
    encoder: ChatEncoder,
    identity: CacheIdentity,
    mapped: MappedCache | None,
) -> TeacherPass:
    align = None if mapped is None else partial(align_teacher, mapped.pair)
    dataset = ChatDataset(data, {"teacher": encoder}, align=align)
    return TeacherPass(job, engine, dataset, identity.layers, identity.vocab, None if mapped is None else mapped.ids)


def _identity(
    job: Job, verbalize: dict[str, Any], encoder: ChatEncoder, mapped: MappedCache | None = None
) -> CacheIdentity:
    """The cache's identity. Rank 0 hashes, for all ranks, or waits for another job that hashes the same."""
    recipe, verbalized = job.recipe, verbalize["teacher"]

    def prints() -> list[dict[str, str]]:
        if not job.ranks.first:
            return []
        hashes = HashStore(recipe.run)
        verbalizers = files_fingerprint([recipe.run / "verbalize" / "teacher.safetensors"], hashes)
        teacher = teacher_fingerprints(recipe.teacher.path, str(encoder.processor.chat_template), hashes)
        teacher |= encoder.template.fingerprint_of_bos()
        data = recipe.data
        of_samples = sample_fingerprints(data.max_length, data.min_pixels, data.max_pixels)
        return [
            {**teacher, "verbalizers": verbalizers, **of_samples, **({} if mapped is None else mapped.fingerprints)}
        ]

    (fingerprints,) = gather_when_ready(job.ranks, f"{NAME}: hashing the teacher, {recipe.teacher.path}", prints)
    layers = (*verbalized["layers"], verbalized["depth"])
    codec = codec_params(recipe.cache.codec.model_dump(), recipe.seed)
    return CacheIdentity(codec, layers, verbalize["vocab"] if mapped is None else mapped.ids.size, fingerprints)


def _open(job: Job, identity: CacheIdentity, data: ShardFolder) -> CacheFolder:
    """The folder for this identity. Rank 0 looks, and begins it where there is none, for all ranks."""
    root, recipe = own_caches(job.recipe), job.recipe.run / "recipe.yaml"

    def begin() -> Path:
        return CacheFolder(folder_for(root, identity, data), identity, data, recipe).path

    path = as_first_rank_sees(job.ranks, f"{NAME}: opening {root}", begin)
    wait_for_files(job.ranks, [path / IDENTITY, path / ORDER])
    return CacheFolder(path, identity, data, recipe)


def _work(
    job: Job, cache: CacheFolder, data: ShardFolder, shards: tuple[int, int] | None, verify: bool
) -> tuple[set[str], dict[str, str]]:
    """Files that the folder needs before any shard, and {shard to be made: reason}.

    One rank looks at each, for all: another job may be filling the same cache meanwhile.
    """
    first, last = shards or (0, len(data.shards) - 1)
    if last >= len(data.shards):
        raise CacheError(f"--shards {first}-{last}: {data.path} has shards 0-{len(data.shards) - 1}")
    names = [shard.name for shard in data.shards[first : last + 1]]

    def look() -> list[Any]:
        own = names[job.ranks.rank :: job.ranks.world]
        return [(cache.missing_files if job.ranks.first else set(), cache.missing(own, verify=verify))]

    doing = "hashing" if verify else "looking at"
    found = gather_when_ready(job.ranks, f"{NAME}: {doing} {len(names)} shards in {cache.path}", look)
    why = {name: reason for _, missing in found for name, reason in missing.items()}
    return found[0][0], {name: why[name] for name in names if name in why}


def _say_why(job: Job, missing: dict[str, str]) -> None:
    """Print why shards are made, the rarest reasons first: a damaged shard is not lost among many missing ones."""
    shards: dict[str, list[str]] = {}
    for name, reason in missing.items():
        shards.setdefault(reason, []).append(name)
    rarest = sorted(shards.items(), key=lambda item: len(item[1]))
    for reason, names in rarest[:REASONS_SAID]:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        job.say(f"{NAME}: {names[0]}{others}: {reason}")
    if unsaid := sum(len(names) for _, names in rarest[REASONS_SAID:]):
        job.say(f"{NAME}: {unsaid} more shards, for other reasons")


def _check_verbalizers(job: Job, verbalize: dict[str, Any]) -> None:
    """Raise CacheError, on all ranks, where the teacher's verbalizers are no longer as stage 1 left them."""
    run = job.recipe.run
    path, expected = run / "verbalize" / "teacher.safetensors", verbalize.get("sha256", {}).get("teacher")
    again = train_command(1, run / "recipe.yaml", "--only", "verbalize")
    repair = f"Bring it back, or make it again: rm -r {path.parent} && {again}"
    as_first_rank_sees(job.ranks, f"{NAME}: checking {path}", lambda: check_sha256(path, expected, repair))
    wait_for_files(job.ranks, [path])


def load_teacher(job: Job, vocab: int, encoder: ChatEncoder) -> Engine:
    """An engine that holds the teacher with its verbalizers, frozen and checked. All ranks must call."""
    recipe = job.recipe
    verb_ffns = recipe.run / "verbalize" / "teacher.safetensors"
    with sharded_loading(recipe, recipe.cache) as add_to:
        teacher = load_trained(recipe.teacher, recipe, vocab, dtype_of(recipe), verb_ffns, add_to)
    module = CoHost({"teacher": teacher}).requires_grad_(False)
    engine = Engine(module, recipe, recipe.cache, job.ranks)
    check_parts(teacher.backbone, encoder, teacher.layers, engine.device, engine.dtype)
    return engine


def _prepare(
    job: Job, teacher_pass: TeacherPass, cache: CacheFolder, missing_files: set[str], mapped: MappedCache | None
) -> None:
    """Write the files that must exist before the first shard."""
    if mapped is not None and "mapping" in missing_files:
        if job.ranks.first:
            cache.save_map(mapped.ids)
        wait_for_files(job.ranks, [cache.path / MAPPING])
    if "head" in missing_files:
        head = teacher_pass.head()

        def save() -> None:
            if head is not None:  # on rank 0
                cache.save_head(head)

        on_first_rank(job.ranks, f"{NAME}: writing the teacher's head to {cache.path}", save)
    if "order" in missing_files:
        order = find_vocabulary_order(teacher_pass)
        if job.ranks.first:
            cache.save_order(order)
        wait_for_files(job.ranks, [cache.path / ORDER])


def _fill(job: Job, teacher_pass: TeacherPass, cache: CacheFolder, missing: list[str]) -> None:
    data, codec, (each, bucket) = teacher_pass.dataset.folder, cache.codec(), rehearse(teacher_pass, cache)
    if bucket is not None:
        _check_bucket(job, bucket)
    samples, lacking = _samples(job, cache, data, missing)
    job.say(
        f"{NAME}: {len(missing)} of {len(data.shards)} shards to make, about {each * samples}; "
        f"the whole cache lacks {each * lacking}"
    )
    check_disk_space(cache, each * samples, each * lacking)
    if job.ranks.first:
        (job.recipe.run / NAME / "done.json").unlink(missing_ok=True)  # whoever finds all shards there writes it again
    windows = plan(data, missing, job.ranks.rank, job.ranks.world)
    loaded = Waited(teacher_pass.batches([window.indices for window in windows]))
    with ExitStack() as stack:
        keeping_up = KeepingUp(job, NAME, loaded, teacher_pass.workers)
        log = _Log(job, stack, cache.path.name, samples, each * samples, keeping_up.values)
        writing = stack.enter_context(WriterThread(cache))
        written: list[WrittenBatch] = []
        for shard_batch in until_all_done(shard_batches(windows, loaded), job.ranks, STOPPED):
            one = shard_batch.loaded if shard_batch else teacher_pass.empty_batch
            sizes = one.sizes() if shard_batch else "none left"
            watch.doing(f"{NAME}: after {log.progress.done} samples of {samples}, a batch: {sizes}")
            keeping_up.batch(one)
            log.written(written)  # now: the ranks have just met, and none is waited for
            output = teacher_pass.encode_response(one, codec)
            written = writing.put(shard_batch, output) if shard_batch else []
        log.written(written + writing.rest())


def _check_bucket(job: Job, bucket: BucketShare) -> None:
    """Raise CacheError, on all ranks alike, where the few samples that were read say that the bucket is too large."""
    (share, *_) = (BucketShare.from_json(one) for one in gather_lists([bucket.to_json()]))
    check_bucket(share, job.recipe.cache.max_bucket_share, f"{share.tokens:,} tokens of samples spread over the data")
    job.say(f"{NAME}: {share.means()[-1]:.2%} of the teacher's probability is in the bucket, at its last layer")


def _samples(job: Job, cache: CacheFolder, data: ShardFolder, missing: list[str]) -> list[int]:
    """Samples that this job will read, and samples that the cache lacks in all, as rank 0 sees it."""
    sizes = {shard.name: shard.samples for shard in data.shards}
    lacking = {*missing, *cache.missing()} if job.ranks.first else set()
    return gather_lists([sum(map(sizes.__getitem__, names)) for names in (missing, lacking)])[:2]


class _Log:
    """Progress of all ranks after each batch, and a metrics line when shards are complete."""

    def __init__(
        self,
        job: Job,
        stack: ExitStack,
        folder: str,
        samples: int,
        estimate: SizeEstimate,
        more: Callable[[], Mapping[str, Any]] = dict,
    ):
        """more: what else a metrics line has."""
        self.job, self.folder, self.estimate, self.begun = job, folder, estimate, time.monotonic()
        self.more = more
        self.tokens = self.bytes = self.shards = 0
        self.bad = BadSamples(job.recipe.data.max_bad_share)
        self.progress = StepProgress(NAME, samples, shown=job.ranks.first)
        stack.callback(self.progress.close)
        self.metrics = Metrics(job.recipe.run, NAME, None) if job.ranks.first else None
        if self.metrics is not None:
            stack.callback(self.metrics.close)

    def written(self, done: list[WrittenBatch]) -> None:
        """Count what all ranks have written. All ranks must call.

        Raises DataError, on all of them, when too many of all ranks' samples are bad.
        """
        own = torch.tensor([(0, 0, 0, 0, 0), *(one.counts() for one in done)], device=self.job.ranks.device).sum(0)
        read, tokens, size, shards, bad = sum_over_ranks(own).tolist()
        if read:
            self._tell(read, tokens, size, shards)
        newest = gather_lists([rejected for one in done for rejected in one.bad]) if bad else []
        if newest and self.job.ranks.first:
            record_rejected(self.job.recipe.run, newest)
        self.bad.count(read, newest)

    def _tell(self, read: int, tokens: int, size: int, shards: int) -> None:
        self.tokens, self.bytes, self.shards = self.tokens + tokens, self.bytes + size, self.shards + shards
        speed = self.tokens / (time.monotonic() - self.begun)
        sizes = f"{size_text(self.bytes)} of about {size_text(self.estimate.bytes)}"
        self.progress.advance(f"{speed:,.0f} tokens/s  {sizes}", by=read)
        if shards and self.metrics is not None:
            values = {"tokens": self.tokens, "tokens_per_s": round(speed, 1), "bytes": self.bytes}
            self.metrics.write(self.shards, {"cache": self.folder, **values, **self.more()})


def _finish(job: Job, cache: CacheFolder, shards: int, made: list[str]) -> None:
    """On rank 0. made: the shards of all this job's ranks, which rank 0 may see only after a while."""
    if not wait_until(lambda: not cache.missing(made)):
        (unseen, why), *_ = cache.missing(made).items()
        raise StorageError(
            f"{cache.path / unseen}: written by another rank of this job, but rank 0 sees: {why}. Expected one file "
            "system that all hosts share; run the same command again: shards that are whole stay"
        )
    largest = job.recipe.cache.max_bucket_share if cache.identity.mapped else None
    if cache.finish(partial(_summary, BadSamples(job.recipe.data.max_bad_share), largest_bucket=largest)):
        size = sum(listed(cache.path, "*.tar").values())
        mark_done(job.recipe.run / NAME, {"folder": cache.path.name, "shards": shards, "bytes": size})
        job.say(f"{NAME}: complete, {shards} shards, {size_text(size)} in {cache.path}")
    else:
        left = cache.missing()
        job.say(f"{NAME}: {shards - len(left)} of {shards} shards are there; other jobs make the rest")


def _summary(bad: BadSamples, sidecars: list[dict[str, Any]], largest_bucket: float | None = None) -> dict[str, Any]:
    """The manifest's summary of what the shards' sidecars measured.

    Raises DataError where too many of all samples could not be used, and CacheError where a mapped vocabulary's bucket
    is too large: each job has seen those of its own shards only.
    """
    bad.read = sum(sidecar["samples"] for sidecar in sidecars)
    bad.rejected = sum(len(sidecar["skipped"]) for sidecar in sidecars)
    bad.check_whole()
    first, *rest = (Fidelity.from_json(sidecar["fidelity"]) for sidecar in sidecars)
    bucket = {} if largest_bucket is None else bucket_summary(sidecars, largest_bucket)
    return {"fidelity": sum(rest, first).summary(), **bucket}
