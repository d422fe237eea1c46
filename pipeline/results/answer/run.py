"""`python -m pipeline answer`: answer the shards of this command's part that have no answers yet."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.shards import MANIFEST, RawSample, ShardFolder, ShardInfo
from pipeline.errors import DataError, SampleError
from pipeline.recipe.schema import Data, ModelParts
from pipeline.results.answer.chats import Answerer, record_bytes
from pipeline.results.answer.folder import REJECTS, AnswerFolder
from pipeline.results.answer.plan import Plan, origin_of
from pipeline.results.arguments import batches
from pipeline.results.generate import load
from pipeline.results.workers import Machine, Workers
from pipeline.runtime.data.bad_samples import BadSamples, Rejected, read_sample
from pipeline.runtime.display.progress import StepProgress, say
from pipeline.vlm.placement import Devices

Answered = bytes | SampleError
"""A sample's new record as the shard holds it, or why it has none."""


def run(plan: Plan) -> None:
    """Answer what is missing of this part; the process that ends last writes the manifest. Says what is left.

    Raises DataError if the share of unusable samples exceeds max_bad_share.
    """
    folder = AnswerFolder(plan.output, origin_of(plan), plan.data)
    missing = [shard for shard in plan.part.of(plan.data.shards) if folder.done(shard) is None]
    if not missing and (plan.output / MANIFEST).is_file() and not folder.missing():
        say(f"{plan.output} is complete: nothing to do")
        return
    if missing:
        _Job(plan, folder).answer(missing)
    left = folder.still_missing()
    if left:
        say(_left(plan, left))
        return
    read, used = folder.finish(_bad_samples(plan))
    say(f"{plan.output}: read {read} = used {used} + rejected {read - used} (listed in {plan.output / REJECTS})")
    say(f"To finetune on it, set reinforce.train: {plan.output} in a recipe, as in recipes/teacher_answers.yaml")


class BatchAnswerer:
    """Answers batches of a shard folder's samples with one model."""

    def __init__(self, answerer: Answerer, data: ShardFolder):
        self.answerer, self.data = answerer, data

    def __call__(self, rows: Iterable[int]) -> list[Answered]:
        """What became of each sample of the batch."""
        read = [self._read(index) for index in rows]
        answered = iter(self.answerer([sample for sample in read if isinstance(sample, RawSample)]))
        results = [next(answered) if isinstance(sample, RawSample) else sample for sample in read]
        return [result if isinstance(result, SampleError) else record_bytes(result) for result in results]

    def _read(self, index: int) -> RawSample | SampleError:
        try:
            return read_sample(self.data, index)
        except SampleError as error:
            return error


def load_answerer(
    model: Path,
    limits: Data,
    data: ShardFolder,
    max_new_tokens: int,
    attention: str,
    parts: ModelParts | None,
    devices: Devices,
) -> BatchAnswerer:
    """Load a model onto devices, to answer samples with it; parts: those that a recipe names."""
    return BatchAnswerer(Answerer(load(model, limits, devices, attention, parts), max_new_tokens), data)


class _Job:
    """One command's work: the model's processes, the progress, and how many samples could not be used."""

    def __init__(self, plan: Plan, folder: AnswerFolder):
        self.plan, self.folder = plan, folder
        self.bad_samples = _bad_samples(plan)
        for shard in plan.part.of(plan.data.shards):  # so that a job that was cut off ends as if it had not been
            if (answers := folder.done(shard)) is not None:
                self.bad_samples.count(answers.read, answers.rejected)

    def answer(self, shards: Sequence[ShardInfo]) -> None:
        """Answer these shards, one after the other."""
        plan, done = self.plan, self.bad_samples.read
        settings = (plan.limits, plan.data, plan.max_new_tokens, plan.attention, plan.parts)
        make = functools.partial(load_answerer, plan.model, *settings)
        groups = Machine().groups(plan.model, plan.processes)
        self.progress = StepProgress("answer", done + sum(shard.samples for shard in shards), done)
        try:
            with Workers(make, groups[: max(len(self._batches(shard)) for shard in shards)]) as workers:
                for shard in shards:
                    with self.folder.lock(shard):
                        if (answers := self.folder.done(shard)) is None:
                            self._answer_shard(workers, shard)
                        else:  # by another process in the meantime
                            self._count(answers.read, answers.rejected, [])
        finally:
            self.progress.close()

    def _batches(self, shard: ShardInfo) -> list[Sequence[int]]:
        """Batches end with the shard, so that its bytes do not depend on what else the process answers."""
        return list(batches(range(shard.first, shard.first + shard.samples), self.plan.batch_size))

    def _answer_shard(self, workers: Workers[Iterable[int], list[Answered]], shard: ShardInfo) -> None:
        all_rows, rejected = self._batches(shard), list[Rejected]()
        answered: dict[int, bytes] = {}
        for rows, results in zip(all_rows, workers.map(all_rows), strict=True):
            bad = []
            for index, result in zip(rows, results, strict=True):
                if isinstance(result, SampleError):
                    bad.append(Rejected.of(self.plan.data, index, result))
                else:
                    answered[index] = result
            rejected += bad
            self._count(len(rows), bad, rejected)
        self.folder.write(shard, self._members(answered), rejected)

    def _count(self, read: int, bad: Sequence[Rejected], of_shard: Sequence[Rejected]) -> None:
        try:
            self.bad_samples.count(read, bad)
        except DataError:
            self.folder.write_rejects(of_shard)  # the message tells the user to look there
            raise
        self.progress.advance(f"rejected {self.bad_samples.rejected}", by=read)

    def _members(self, answered: dict[int, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) of the answered samples: the record is new, the image files are the data's."""
        for index, record in answered.items():
            yield self.plan.data.keys[index], {**self.plan.data.read_members(index), "json": record}


def _bad_samples(plan: Plan) -> BadSamples:
    listed_in = f"{plan.output / REJECTS}, --max-bad-share in python -m pipeline answer --help"
    return BadSamples(plan.limits.max_bad_share, listed_in)


def _left(plan: Plan, left: Sequence[int]) -> str:
    """Which parts remain, when this one is done."""
    parts = sorted({plan.part.owner(number) for number in left}, key=lambda part: part.number)
    return (
        f"part {plan.part} is done; {len(left)} of {len(plan.data.shards)} shards are left, of "
        f"part {', '.join(map(str, parts))}. Each is made by the same command with its --part; the last to end writes "
        f"{plan.output / MANIFEST}"
    )
