"""Stage 1b: the teacher reads every sample once; what each of its layers says about each response token goes to disk.

Each rank makes whole shards, so nothing is gathered; batches are formed within a shard, so that a shard's bytes do not
depend on the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from data_prep.shards import ShardFolder
from pipeline.errors import CacheError, SampleError
from pipeline.loss.chunks import rows_per_chunk
from pipeline.recipe import Codec as CodecRecipe
from pipeline.runtime.batches import BadSamples, Chats, Loaded, Rejected, load
from pipeline.runtime.engine import Engine, dtype_of, sharded_loading
from pipeline.runtime.folder import done, mark_done
from pipeline.runtime.loop import Job, record_rejected
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.progress import StepProgress
from pipeline.runtime.ranks import gather_lists, wait_for_all
from pipeline.teacher.codec import make_codec
from pipeline.teacher.fill import CacheFolder, CacheWriter
from pipeline.teacher.fingerprint import files_fingerprint, teacher_fingerprints
from pipeline.teacher.folder import CacheIdentity
from pipeline.vlm.assemble import encoders, load_verb_ffns, verbalized
from pipeline.vlm.cohost import CoHost
from pipeline.vlm.processing import ChatEncoder

NAME = "cache"


@dataclass(frozen=True)
class Part:
    """One batch of one shard; a rank that has run out of shards takes part in the others' forwards with no samples."""

    shard: str | None
    indices: list[int]
    last: bool
    """Whether the shard is complete with it."""


def run(
    job: Job, hosted: Engine | None = None, shards: tuple[int, int] | None = None, only_missing: bool = False
) -> None:
    """Make the shards that are missing (of a range of shards); those that exist stay.

    hosted: stage 1's engine, which holds the teacher already. only_missing: hash the shards that exist, and make again
    those that have changed.
    """
    recipe = job.recipe
    made = encoders(recipe, ["teacher"])
    data = ShardFolder(recipe.data.train)
    verbalize = done(recipe.run / "verbalize")
    if verbalize is None:
        raise CacheError(
            f"no verbalizers in {recipe.run / 'verbalize'}; run: "
            "deepspeed launch/train.py --stage 1 --only verbalize --recipe R"
        )
    identity = _identity(job, verbalize, made["teacher"])
    cache = CacheFolder(recipe.run / NAME, identity, data, recipe.run / "recipe.yaml")
    missing = _missing(job, cache, data, shards, only_missing)
    lacks_head = bool(gather_lists([not cache.has_head])[0]) and make_codec(**identity.codec).needs_head
    if missing or lacks_head:
        engine = hosted or _load_teacher(job, verbalize["vocab"])
        engine.eval()
        chats = Chats(data, made)
        if lacks_head:
            _save_head(job, engine, chats, cache)
        if missing:
            _fill(job, engine, chats, cache, missing)
    wait_for_all()
    _finish(job, cache, len(data.shards))


def codec_of(codec: CodecRecipe) -> dict[str, Any]:
    """A codec's name and parameters, as a cache's identity holds them."""
    params: dict[str, dict[str, Any]] = {"topk": {"k": codec.k}, "hidden": {"dtype": codec.dtype}}
    return {"name": codec.name, **params[codec.name]}


def plan(data: ShardFolder, shards: list[str], batch_size: int, rank: int, world: int) -> list[Part]:
    """This rank's batches: every world-th shard, padded with empty ones until all ranks have as many."""
    sizes = {shard.name: (shard.first, shard.samples) for shard in data.shards}
    longest = max(sum(-(-sizes[name][1] // batch_size) for name in shards[r::world]) for r in range(world))
    parts = []
    for name in shards[rank::world]:
        first, count = sizes[name]
        for start in range(0, count, batch_size):
            stop = min(count, start + batch_size)
            parts.append(Part(name, list(range(first + start, first + stop)), stop == count))
    return parts + [Part(None, [], False)] * (longest - len(parts))


def _identity(job: Job, verbalize: dict[str, Any], encoder: ChatEncoder) -> CacheIdentity:
    recipe = job.recipe
    spoken = verbalize["teacher"]
    prints = teacher_fingerprints(recipe.teacher.path, str(encoder.processor.chat_template))
    prints["verbalizers"] = files_fingerprint([recipe.run / "verbalize" / "teacher.safetensors"])
    prints["max_length"] = str(recipe.data.max_length)
    layers = (*spoken["layers"], spoken["depth"])
    return CacheIdentity(codec_of(recipe.cache.codec), layers, verbalize["vocab"], prints)


def _missing(
    job: Job, cache: CacheFolder, data: ShardFolder, shards: tuple[int, int] | None, verify: bool
) -> list[str]:
    """Rank 0 looks, for all: another job may be filling the same cache meanwhile."""
    if not job.ranks.first:
        return gather_lists([])
    first, last = shards or (0, len(data.shards) - 1)
    if last >= len(data.shards):
        raise CacheError(f"--shards {first}-{last}: {data.path} has shards 0-{len(data.shards) - 1}")
    return gather_lists(list(cache.missing([s.name for s in data.shards[first : last + 1]], verify=verify)))


def _load_teacher(job: Job, vocab: int) -> Engine:
    recipe = job.recipe
    with sharded_loading(recipe):
        teacher = verbalized(recipe.teacher, recipe, vocab, dtype_of(recipe), seed=0)
    load_verb_ffns(teacher, recipe.run / "verbalize" / "teacher.safetensors")
    module = CoHost({"teacher": teacher}).requires_grad_(False)
    return Engine(module, recipe, None, job.ranks)


def _save_head(job: Job, engine: Engine, chats: Chats, cache: CacheFolder) -> None:
    def keep(_spoken: Tensor, unembedding: Any) -> dict[str, Tensor]:
        if job.ranks.first:
            cache.save_head(unembedding)
        return {}

    (loaded,) = load(chats, [[]], 0, job.ranks.device)
    engine({"teacher": loaded.batches["teacher"].to(engine.device, engine.dtype)}, encode=keep)


def _fill(job: Job, engine: Engine, chats: Chats, cache: CacheFolder, missing: list[str]) -> None:
    recipe = job.recipe
    codec = make_codec(**cache.identity.codec)
    encode = partial(codec.encode, chunk=rows_per_chunk(cache.identity.vocab))
    parts = plan(chats.folder, missing, recipe.cache.batch_size, job.ranks.rank, job.ranks.world)
    loaded = load(chats, [part.indices for part in parts], recipe.data.workers, job.ranks.device)
    samples = sum(shard.samples for shard in chats.folder.shards if shard.name in missing)
    with ExitStack() as stack:
        log = _Log(job, stack, samples, len(missing))
        writer: CacheWriter | None = None
        for part, one in zip(parts, loaded, strict=True):
            batch = one.batches["teacher"]
            codes = engine({"teacher": batch.to(engine.device, engine.dtype)}, encode=encode)
            if part.shard is None:
                continue
            if writer is None:
                writer = stack.enter_context(cache.writer(part.shard))
            bad = _write(writer, one, codes)
            if part.last:
                writer.commit()
                writer = None
            log.batch(part, len(batch.labels), bad)


def _write(writer: CacheWriter, loaded: Loaded, codes: dict[str, Tensor]) -> list[Rejected]:
    bad = list(loaded.rejected)
    for rejected in loaded.rejected:
        writer.skip(rejected.key, rejected.reason)
    for key, tokens, arrays in _records(loaded, codes):
        try:
            writer.add(key, tokens, arrays)
        except SampleError as error:
            writer.skip(key, str(error))
            bad.append(Rejected(key, writer.path.name, str(error)))
    return bad


def _records(loaded: Loaded, codes: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    batch = loaded.batches["teacher"]
    split = {name: array.cpu().split(list(batch.counts)) for name, array in codes.items()}
    for place, (key, tokens) in enumerate(zip(batch.keys, batch.labels.split(list(batch.counts)), strict=True)):
        yield key, tokens, {name: parts[place] for name, parts in split.items()}


class _Log:
    """What is told while the cache grows: metrics a shard, progress a batch (this rank's, times the ranks)."""

    def __init__(self, job: Job, stack: ExitStack, samples: int, shards: int):
        self.job, self.tokens, self.begun = job, 0, time.monotonic()
        self.bad = BadSamples(job.recipe.data.max_bad_share)
        self.progress = StepProgress(NAME, samples, shown=job.ranks.first)
        stack.callback(self.progress.close)
        self.metrics = Metrics(job.recipe.run, NAME, 0) if job.ranks.first else None
        if self.metrics is not None:
            stack.callback(self.metrics.close)
        self.shards_done = 0

    def batch(self, part: Part, tokens: int, bad: list[Rejected]) -> None:
        self.tokens += tokens
        speed = self.tokens * self.job.ranks.world / (time.monotonic() - self.begun)
        if bad:
            record_rejected(self.job.recipe.run, bad)
        self.bad.count(len(part.indices), bad)
        left = self.progress.total - self.progress.done
        self.progress.advance(f"{speed:,.0f} tokens/s", by=min(left, len(part.indices) * self.job.ranks.world))
        if part.last:
            self.shards_done += 1
            if self.metrics is not None:
                values = {"shard": part.shard, "tokens": self.tokens, "tokens_per_s": round(speed, 1)}
                self.metrics.write(self.shards_done, values)


def _finish(job: Job, cache: CacheFolder, shards: int) -> None:
    if not job.ranks.first:
        return
    if cache.finish():
        size = sum(file.stat().st_size for file in cache.path.glob("*.tar"))
        mark_done(cache.path, {"shards": shards, "bytes": size})
        job.say(f"{NAME}: complete, {shards} shards, {size / 1e6:,.1f} MB in {cache.path}")
    else:
        left = cache.missing()
        job.say(f"{NAME}: {shards - len(left)} of {shards} shards are there; other jobs make the rest")
