"""`python -m pipeline answer`: answer the shards of this process's part that have no answers yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.shards import MANIFEST, ShardInfo
from pipeline.errors import DataError, SampleError
from pipeline.results.answer.chats import Answerer, record_bytes
from pipeline.results.answer.folder import REJECTS, AnswerFolder
from pipeline.results.answer.plan import Plan, origin_of
from pipeline.results.arguments import batches
from pipeline.results.generate import load
from pipeline.runtime.batches import BadSamples, Rejected
from pipeline.runtime.progress import StepProgress, say


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
    left = folder.missing()
    if left:
        say(_left(plan, left))
        return
    read, used = folder.finish()
    say(f"{plan.output}: read {read} = used {used} + rejected {read - used} (listed in {plan.output / REJECTS})")
    say(f"To finetune on it, set reinforce.train: {plan.output} in a recipe; in all steps, data.train")


class _Job:
    """One process's work: the model, the progress, and how many samples could not be used."""

    def __init__(self, plan: Plan, folder: AnswerFolder):
        self.plan, self.folder = plan, folder
        self.bad_samples = BadSamples(
            plan.limits.max_bad_share,
            listed_in=f"{plan.output / REJECTS}, --max-bad-share in python -m pipeline answer --help",
        )
        for shard in plan.part.of(plan.data.shards):  # so that a job that was cut off ends as if it had not been
            if (answers := folder.done(shard)) is not None:
                self.bad_samples.count(answers.read, answers.rejected)

    def answer(self, shards: Sequence[ShardInfo]) -> None:
        """Answer these shards, one after the other."""
        done = self.bad_samples.read
        answerer = Answerer(load(self.plan.model, self.plan.limits), self.plan.max_new_tokens)
        self.progress = StepProgress("answer", done + sum(shard.samples for shard in shards), done)
        try:
            for shard in shards:
                with self.folder.lock(shard):
                    if (answers := self.folder.done(shard)) is None:
                        self._answer_shard(answerer, shard)
                    else:  # by another process in the meantime
                        self._count(answers.read, answers.rejected, [])
        finally:
            self.progress.close()

    def _answer_shard(self, answerer: Answerer, shard: ShardInfo) -> None:
        """Batches end with the shard, so that its bytes do not depend on what else the process answers."""
        data, rejected = self.plan.data, list[Rejected]()
        answered: dict[int, bytes] = {}
        for rows in batches(range(shard.first, shard.first + shard.samples), self.plan.batch_size):
            bad = []
            for index, result in zip(rows, answerer([data.read(index) for index in rows]), strict=True):
                if isinstance(result, SampleError):
                    bad.append(Rejected.of(data, index, result))
                else:
                    answered[index] = record_bytes(result)
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


def _left(plan: Plan, left: Sequence[int]) -> str:
    """Which parts remain, when this one is done."""
    parts = sorted({plan.part.owner(number) for number in left}, key=lambda part: part.number)
    return (
        f"part {plan.part} is done; {len(left)} of {len(plan.data.shards)} shards are left, of "
        f"part {', '.join(map(str, parts))}. Each is made by the same command with its --part; the last to end writes "
        f"{plan.output / MANIFEST}"
    )
