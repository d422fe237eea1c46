"""The benchmarks that can be asked for by name: the paper's columns, and the lmms-eval task and metric behind each.

Names of tasks and metrics are those of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import RecipeError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, and where lmms-eval's results have its score."""

    name: str
    """As in --benchmarks."""
    column: str
    """Heading, as in the paper's tables."""
    task: str
    """Task or group of lmms-eval."""
    metrics: tuple[str, ...]
    """Keys of the task's results, "METRIC,FILTER"; the score is their sum."""
    scale: float = 100.0
    """What a sum is multiplied by, so that scores stand as in the paper: lmms-eval gives some as shares of one."""
    judged: bool = False
    """Whether lmms-eval asks a model behind an API to judge or to read the answers."""
    greedy: bool = False
    """Whether the task's own settings sample, and greedy decoding has to be asked for: the paper's is greedy."""
    note: str = ""
    """How the score differs from the paper's, where that is known."""

    def shown(self, score: float) -> str:
        """A score as text: as in the paper, or of an unnamed task, whose scale is not known, with four digits."""
        return f"{score:.1f}" if self.name in BY_NAME else f"{score:.4g}"


BENCHMARKS = (
    Benchmark("qbench", "QBench", "qbench_dev", ("qbench_acc,none",), note="the dev split"),
    Benchmark("ai2d", "AI2D", "ai2d", ("exact_match,flexible-extract",)),
    Benchmark("chartqa", "ChartQA", "chartqa", ("relaxed_overall,none",)),
    Benchmark(
        "pope", "POPE", "pope", ("pope_f1_score,none",), note="F1, as papers mostly quote it; this one does not say"
    ),
    Benchmark(
        "hallb", "HallB", "hallusion_bench_image", ("aAcc,none",), 1.0, judged=True,
        note="aAcc; the paper does not say which accuracy it quotes, and its baselines are above the official average",
    ),
    Benchmark("mme", "MME", "mme", ("mme_perception_score,none", "mme_cognition_score,none"), 1.0),
    Benchmark("mathvista", "MathVista", "mathvista_testmini_format", ("llm_as_judge_eval,none",), 1.0, judged=True),
    Benchmark(
        "mmb", "MMB", "mmbench_en_dev", ("gpt_eval_score,none",), 1.0, judged=True,
        note="the dev split; the test split, which reports of Qwen2-VL quote, is scored by a server",
    ),
    Benchmark(
        "mmb-cn", "MMB-CN", "mmbench_cn_dev", ("gpt_eval_score,none",), 1.0, judged=True, note="the dev split, as mmb"
    ),
    Benchmark("mmvet", "MM-Vet", "mmvet", ("gpt_eval_score,none",), 1.0, judged=True, greedy=True),
    Benchmark("mmmu", "MMMU", "mmmu_val", ("mmmu_acc,none",), note="the validation split"),
    Benchmark("mmvet-v2", "MM-Vet v2", "mmvetv2", ("gpt_eval_score,none",), 1.0, judged=True, greedy=True),
    Benchmark("mmstar", "MMStar", "mmstar", ("average,none",)),
    Benchmark("seed2plus", "SEED-2-Plus", "seedbench_2_plus", ("seedbench_2_plus_all,none",)),
    Benchmark("blink", "BLINK", "blink", ("blink_acc,none",), note="the validation split, over all questions"),
    Benchmark("cvbench", "CV-Bench", "cv_bench", ("cv_bench_acc,none",), note="over all questions"),
    Benchmark(
        "llava-wilder", "LLaVA-Wilder", "llava_wilder_small", ("gpt_eval_llava_all,none",), 1.0, judged=True,
        note="relative to GPT-4V's answers, at most 128 tokens long",
    ),
)  # fmt: skip

BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def asked_for(text: str) -> list[Benchmark]:
    """The benchmarks of a list such as "ai2d,mmmu,my_task:exact_match", without repeats.

    TASK:METRIC is any task of lmms-eval, its own or one in --include-path, and its metric is shown as it is. Raises
    RecipeError for another name.
    """
    found = {word: _one(word) for word in (part.strip() for part in text.split(",")) if word}
    if not found:
        raise RecipeError(f"--benchmarks is empty; {_names()}")
    return list(found.values())


def titles(benchmarks: Sequence[Benchmark]) -> str:
    """Their names, for a message."""
    return ", ".join(benchmark.name for benchmark in benchmarks)


def _one(word: str) -> Benchmark:
    if word in BY_NAME:
        return BY_NAME[word]
    task, colon, metric = word.partition(":")
    if not (task and colon and metric):
        raise RecipeError(f"--benchmarks: no benchmark is named {word!r}; {_names()}")
    return Benchmark(word, word, task, (f"{metric},none",), 1.0)


def _names() -> str:
    return f"named ones are {titles(BENCHMARKS)}; any other task of lmms-eval is asked for as TASK:METRIC"
