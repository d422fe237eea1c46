"""The student on data that no step trains on, measured between two updates. It changes nothing of the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data_prep.shards import ShardFolder
from pipeline.errors import DataError
from pipeline.recipe.schema import StudentTraining
from pipeline.runtime.data.bad_samples import Rejected
from pipeline.runtime.data.batches import ChatDataset, SampleIndex
from pipeline.runtime.data.cutting import cut
from pipeline.runtime.data.lengths import Lengths, fit_lengths
from pipeline.runtime.data.loader import load
from pipeline.runtime.display.progress import say
from pipeline.runtime.engine import Engine
from pipeline.runtime.faults import watch
from pipeline.runtime.folder import HELD_OUT
from pipeline.runtime.ranks import Ranks, gather_lists, sum_over_ranks
from pipeline.vlm.processing import Batch, ChatEncoder


class HeldOut:
    """A step's measurements on held-out data."""

    def __init__(
        self,
        name: str,
        training: StudentTraining,
        folder: Path,
        encoder: ChatEncoder,
        score: Callable[[Batch], Tensor],
        ids: int | None = None,
    ):
        """folder: of shards. score: the sums of vlm.response_scores for a batch, through the engine's forward.

        ids: how many the head is cut to, where it is.
        """
        self.name, self.training, self.score = name, training, score
        self.dataset = ChatDataset(ShardFolder(folder), {"student": encoder}, ids={"student": ids} if ids else None)
        self._micro_batches: list[list[SampleIndex]] | None = None
        self._said = False

    def is_due(self, update: int, total: int) -> bool:
        """Whether to measure after so many updates: every evaluate_every, and at the step's end."""
        return update % self.training.evaluate_every == 0 or update == total

    def measure(self, engine: Engine, ranks: Ranks, workers: int) -> dict[str, float]:
        """HELD_OUT as {name: value}, over all samples and ranks. All ranks must call.

        Without the exact match where max_length has cut every answer. Raises DataError, on all of them, where no sample
        can be used. Modules are in eval mode meanwhile; torch's random numbers go on afterwards as if nothing had been.
        workers: loader processes of this rank.
        """
        watch.doing(f"{self.name}: opening the held-out data", long=True)
        plan = self._micro_batches = self._micro_batches or self.plan(ranks)
        found, rejected = torch.zeros(4, dtype=torch.float64), list[Rejected]()
        gpu = [engine.device] if engine.device.type == "cuda" else []
        engine.eval()
        with torch.random.fork_rng(gpu), torch.no_grad():
            micro_batches = load(self.dataset, plan, workers, ranks.device, ahead=1)  # the step's own wait meanwhile
            for number, loaded in enumerate(micro_batches):
                watch.doing(f"{self.name}: held-out micro-batch {number + 1} of {len(plan)}: {loaded.sizes()}")
                found += self.score(loaded.batches["student"].to(engine.device, engine.dtype))
                rejected += loaded.rejected
        engine.train()
        watch.doing(f"{self.name}: summing up the held-out data with all ranks")
        nats, tokens, right, answers = sum_over_ranks(found.to(engine.device)).tolist()
        self._judge(gather_lists(rejected), int(answers), ranks)
        loss, exact_match = HELD_OUT
        return {loss: nats / tokens, **({exact_match: right / answers} if answers else {})}

    def plan(self, ranks: Ranks) -> list[list[SampleIndex]]:
        """This rank's micro-batches: every rank has as many, for under ZeRO-3 all must run the same modules."""
        samples = [SampleIndex(sample) for sample in range(len(self.dataset))]
        if self.training.micro_batch_tokens is not None and self.dataset.folder.has_sizes:
            length = Lengths(self.dataset, fit_lengths(self.dataset, ranks, self.name))
            return [micro_step[ranks.rank] for micro_step in cut(samples, length, self.training, ranks.world)]
        size = self.training.micro_batch_size
        own = range(ranks.rank * size, len(samples) + ranks.rank * size, size * ranks.world)
        return [samples[start : start + size] for start in own]

    def _judge(self, rejected: list[Rejected], answers: int, ranks: Ranks) -> None:
        """Say once which samples are left out, and of how many the answer. Raises DataError where none is left."""
        named = "".join(f"; first {one.key} in {one.shard}: {one.reason}" for one in rejected[:1])
        if len(rejected) == len(self.dataset):
            folder = self.dataset.folder.path
            raise DataError(f"data.held_out: none of the {len(rejected)} samples of {folder} can be used{named}")
        if self._said:
            return
        self._said, of = True, f"of {len(self.dataset)} samples of data.held_out"
        if rejected:
            say(
                f"warning: {self.name}: {len(rejected)} {of} cannot be used and are not measured on{named}", ranks.first
            )
        if cut := len(self.dataset) - len(rejected) - answers:
            why = "the last answer is cut at data.max_length: held_out_exact_match leaves them out"
            say(f"warning: {self.name}: {cut} {of}: {why}", ranks.first)


def open_held_out(
    name: str,
    training: StudentTraining,
    folder: Path | None,
    encoder: ChatEncoder,
    score: Callable[[Batch], Tensor],
    ids: int | None = None,
) -> HeldOut | None:
    """As HeldOut; None where the recipe does not ask for it."""
    if not training.evaluate_every or folder is None:
        return None
    return HeldOut(name, training, folder, encoder, score, ids)
