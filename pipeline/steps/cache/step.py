"""Stage 1b: one pass of the teacher over the data; its layers' distributions at response tokens go to disk.

Each rank makes whole shards, so nothing is gathered; batches are formed within a shard, so that a shard's bytes do not
depend on the number of ranks.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch

from data_prep.shards import ShardFolder
from pipeline.cache.find import folder_for
from pipeline.cache.fingerprint import files_fingerprint, sample_fingerprints, teacher_fingerprints
from pipeline.cache.layout import CacheIdentity, codec_params
from pipeline.cache.writer import CacheFolder
from pipeline.commands import train_command
from pipeline.errors import CacheError
from pipeline.loss.fidelity import Fidelity
from pipeline.runtime.data.batches import BadSamples, ChatDataset
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.folder import done, mark_done
from pipeline.runtime.loop import Job, record_rejected
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.progress import StepProgress, size_text
from pipeline.runtime.ranks import (
    gather_lists,
    gather_when_ready,
    on_first_rank,
    sum_over_ranks,
    until_all_done,
    wait_for_all,
)
from pipeline.steps.cache.estimate import SizeEstimate, check_disk_space, estimate_size, find_vocabulary_order
from pipeline.steps.cache.teacher_pass import TeacherPass
from pipeline.steps.cache.writing import WriterThread, WrittenBatch, plan, shard_batches
from pipeline.vlm.assemble import encoders, load_trained
from pipeline.vlm.cohost import CoHost
from pipeline.vlm.processing import ChatEncoder

NAME = "cache"

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
    made = encoders(recipe, ["teacher"])
    data = ShardFolder(recipe.data.train)
    cache = _open(job, _identity(job, verbalize, made["teacher"]), data)
    missing_files, missing = _work(job, cache, data, shards, only_missing)
    if missing or missing_files:
        _say_why(job, missing)
        engine = hosted or _load_teacher(job, verbalize["vocab"])
        teacher_pass = TeacherPass(job, engine, ChatDataset(data, made), cache.identity.layers, cache.identity.vocab)
        _prepare(job, teacher_pass, cache, missing_files)
        _, missing = _work(job, cache, data, shards, only_missing) if missing_files else (missing_files, missing)
        if missing:
            _fill(job, teacher_pass, cache, list(missing))
    wait_for_all()
    on_first_rank(job.ranks, f"{NAME}: writing the manifest", lambda: _finish(job, cache, len(data.shards)))


def _verbalizers(job: Job) -> dict[str, Any]:
    """The summary of step verbalize, as rank 0 sees it."""
    run = job.recipe.run
    (summary,) = gather_lists([done(run / "verbalize")] if job.ranks.first else [])
    if summary is None:
        again = train_command(1, run / "recipe.yaml", "--only", "verbalize")
        raise CacheError(f"no verbalizers in {run / 'verbalize'}; run: {again}")
    return summary


def _identity(job: Job, verbalize: dict[str, Any], encoder: ChatEncoder) -> CacheIdentity:
    """The cache's identity. Rank 0 hashes, for all ranks."""
    recipe, verbalized = job.recipe, verbalize["teacher"]

    def prints() -> list[dict[str, str]]:
        if not job.ranks.first:
            return []
        verbalizers = files_fingerprint([recipe.run / "verbalize" / "teacher.safetensors"])
        teacher = teacher_fingerprints(recipe.teacher.path, str(encoder.processor.chat_template))
        data = recipe.data
        of_samples = sample_fingerprints(data.max_length, data.min_pixels, data.max_pixels)
        return [{**teacher, "verbalizers": verbalizers, **of_samples}]

    (fingerprints,) = gather_when_ready(job.ranks, f"{NAME}: hashing the teacher, {recipe.teacher.path}", prints)
    layers = (*verbalized["layers"], verbalized["depth"])
    codec = codec_params(recipe.cache.codec.model_dump(), recipe.seed)
    return CacheIdentity(codec, layers, verbalize["vocab"], fingerprints)


def _open(job: Job, identity: CacheIdentity, data: ShardFolder) -> CacheFolder:
    """The folder for this identity. Rank 0 looks, for all ranks."""
    root = job.recipe.run / NAME
    path = gather_lists([folder_for(root, identity, data) if job.ranks.first else None])[0]
    return CacheFolder(path, identity, data, job.recipe.run / "recipe.yaml")


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


def _load_teacher(job: Job, vocab: int) -> Engine:
    recipe = job.recipe
    verb_ffns = recipe.run / "verbalize" / "teacher.safetensors"
    with sharded_loading(recipe, recipe.cache) as add_to:
        teacher = load_trained(recipe.teacher, recipe, vocab, dtype_of(recipe), verb_ffns, add_to)
    module = CoHost({"teacher": teacher}).requires_grad_(False)
    return Engine(module, recipe, recipe.cache, job.ranks)


def _prepare(job: Job, teacher_pass: TeacherPass, cache: CacheFolder, missing_files: set[str]) -> None:
    """Write the files that must exist before the first shard."""
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
    wait_for_all()


def _fill(job: Job, teacher_pass: TeacherPass, cache: CacheFolder, missing: list[str]) -> None:
    data, codec, each = teacher_pass.dataset.folder, cache.codec(), estimate_size(teacher_pass, cache)
    samples, lacking = _samples(job, cache, data, missing)
    job.say(
        f"{NAME}: {len(missing)} of {len(data.shards)} shards to make, about {each * samples}; "
        f"the whole cache lacks {each * lacking}"
    )
    check_disk_space(cache, each * samples, each * lacking)
    if job.ranks.first:
        (job.recipe.run / NAME / "done.json").unlink(missing_ok=True)  # whoever finds all shards there writes it again
    windows = plan(data, missing, job.ranks.rank, job.ranks.world)
    loaded = teacher_pass.batches([window.indices for window in windows])
    with ExitStack() as stack:
        log = _Log(job, stack, cache.path.name, samples, each * samples)
        writing = stack.enter_context(WriterThread(cache))
        written: list[WrittenBatch] = []
        for shard_batch in until_all_done(shard_batches(windows, loaded), job.ranks):
            log.written(written)  # now: the ranks have just met, and none is waited for
            output = teacher_pass.encode_response(
                shard_batch.loaded if shard_batch else teacher_pass.empty_batch, codec
            )
            written = writing.put(shard_batch, output) if shard_batch else []
        log.written(written + writing.rest())


def _samples(job: Job, cache: CacheFolder, data: ShardFolder, missing: list[str]) -> list[int]:
    """Samples that this job will read, and samples that the cache lacks in all, as rank 0 sees it."""
    sizes = {shard.name: shard.samples for shard in data.shards}
    lacking = {*missing, *cache.missing()} if job.ranks.first else set()
    return gather_lists([sum(map(sizes.__getitem__, names)) for names in (missing, lacking)])[:2]


class _Log:
    """Progress of all ranks after each batch, and a metrics line when shards are complete."""

    def __init__(self, job: Job, stack: ExitStack, folder: str, samples: int, estimate: SizeEstimate):
        self.job, self.folder, self.estimate, self.begun = job, folder, estimate, time.monotonic()
        self.tokens = self.bytes = self.shards = 0
        self.bad = BadSamples(job.recipe.data.max_bad_share)
        self.progress = StepProgress(NAME, samples, shown=job.ranks.first)
        stack.callback(self.progress.close)
        self.metrics = Metrics(job.recipe.run, NAME, None) if job.ranks.first else None
        if self.metrics is not None:
            stack.callback(self.metrics.close)

    def written(self, done: list[WrittenBatch]) -> None:
        """Count what all ranks have written. All ranks must call. Raises DataError when too many samples are bad."""
        own = torch.tensor([(0, 0, 0, 0), *(one.counts() for one in done)], device=self.job.ranks.device).sum(0)
        for one in done:
            if one.bad:
                record_rejected(self.job.recipe.run, one.bad)
            self.bad.count(one.counts()[0], one.bad)
        read, tokens, size, shards = sum_over_ranks(own).tolist()
        if read:
            self._tell(read, tokens, size, shards)

    def _tell(self, read: int, tokens: int, size: int, shards: int) -> None:
        self.tokens, self.bytes, self.shards = self.tokens + tokens, self.bytes + size, self.shards + shards
        speed = self.tokens / (time.monotonic() - self.begun)
        sizes = f"{size_text(self.bytes)} of about {size_text(self.estimate.bytes)}"
        self.progress.advance(f"{speed:,.0f} tokens/s  {sizes}", by=read)
        if shards and self.metrics is not None:
            values = {"tokens": self.tokens, "tokens_per_s": round(speed, 1), "bytes": self.bytes}
            self.metrics.write(self.shards, {"cache": self.folder, **values})


def _finish(job: Job, cache: CacheFolder, shards: int) -> None:
    if cache.finish(_fidelity):
        size = sum(file.stat().st_size for file in cache.path.glob("*.tar"))
        mark_done(job.recipe.run / NAME, {"folder": cache.path.name, "shards": shards, "bytes": size})
        job.say(f"{NAME}: complete, {shards} shards, {size_text(size)} in {cache.path}")
    else:
        left = cache.missing()
        job.say(f"{NAME}: {shards - len(left)} of {shards} shards are there; other jobs make the rest")


def _fidelity(sidecars: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's summary of what the shards' sidecars measured."""
    first, *rest = (Fidelity.from_json(sidecar["fidelity"]) for sidecar in sidecars)
    return {"fidelity": sum(rest, first).summary()}
