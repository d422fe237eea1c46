"""Verbalizer outputs of a teacher and a student, with verbalizers trained on a real language model.

T response tokens, J teacher layers, S student layers, d width, V vocabulary. The teacher is SmolLM2-135M-Instruct; the
student is the same model with noise on its weights. A verbalizer is the project's own: verb-FFN, final norm, frozen
head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.cache.conversations import Conversation, conversations
from bench.cache.language_model import PACKAGE, bench_cache, smollm2
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.signal import Unembedding
from pipeline.vlm.verb_ffns import initial_verb_ffns


@dataclass(frozen=True)
class Setting:
    """All settings that determine the numbers; key of the benchmark's cache."""

    teacher_layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26)
    student_layers: tuple[int, ...] = (2, 8, 14, 20, 26)
    noise: float = 0.1
    """Student: standard deviation of the noise on each weight matrix, relative to that of the matrix."""
    steps: int = 90
    """Number of updates of each verbalizer."""
    batch: int = 256
    """Tokens per update."""
    eval_tokens: int = 1280
    learning_rate: float = 1e-2
    """Peak value. The rate rises over `warmup` updates and falls to zero at the end."""
    warmup: int = 5
    order_tokens: int = 2560
    """Number of training tokens that determine the vocabulary order by the teacher's use."""
    follower: int = 14
    """Student layer that is trained in the training test."""
    followed: int = 20
    """Teacher layer that it follows."""
    seed: int = 0
    package: str = PACKAGE

    @property
    def train_tokens(self) -> int:
        """Number of training tokens; each is seen once."""
        return self.steps * self.batch


@dataclass(frozen=True)
class LayerOutputs:
    """Tensors that the benchmark works on, all float32."""

    setting: Setting
    teacher: Tensor
    """[T, J, d] normed verbalizer outputs of the teacher on the evaluation tokens; J counts the last layer too."""
    student: Tensor
    """[T, S + 1, d] the same of the student."""
    teacher_weight: Tensor
    """[V, d] weight of the teacher's head."""
    student_weight: Tensor
    """[V, d] weight of the student's head."""
    labels: Tensor
    """[T] ids of the evaluation tokens."""
    lengths: Tensor
    """Number of tokens of each evaluation answer; the sum is T."""
    order: Tensor
    """[V] ids by decreasing mean probability from the teacher, over layers and some training tokens."""
    train_teacher: Tensor
    """[T', d] normed verbalizer outputs of the followed teacher layer on the training tokens."""
    train_student: Tensor
    """[T', d] hidden states of the following student layer on the training tokens, before its verbalizer."""
    eval_student: Tensor
    """[T, d] the same on the evaluation tokens."""
    norm_weight: Tensor
    """[d] weight of the student's final norm."""
    teacher_loss: Tensor
    """[J] mean cross-entropy on the evaluation tokens, in nats."""
    student_loss: Tensor
    """[S + 1] the same of the student."""
    follower: dict[str, Tensor]
    """Weights of the verb-FFN of the following student layer."""

    @property
    def followed(self) -> int:
        """Column of the followed teacher layer."""
        return self.setting.teacher_layers.index(self.setting.followed)

    @property
    def unembedding(self) -> Unembedding:
        """The teacher's head."""
        return Unembedding(self.teacher_weight, vocab=len(self.teacher_weight))

    @property
    def student_unembedding(self) -> Unembedding:
        """The student's head."""
        return Unembedding(self.student_weight, vocab=len(self.student_weight))


def layer_outputs(setting: Setting, progress: Progress) -> LayerOutputs:
    """Read the tensors from the benchmark's cache; if absent, compute them (about 20 minutes of one core, once)."""
    tensors = _cached("teacher", _teacher, setting, progress) | _cached("student", _student, setting, progress)
    follower = {name.removeprefix("follower."): tensors.pop(name) for name in list(tensors) if "follower." in name}
    return LayerOutputs(setting=setting, follower=follower, **tensors)


def _cached(role: str, make: Callable[[Setting, Progress], dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
    """The tensors of `make`, read from the benchmark's cache if made before with the same setting and text."""
    setting = {**asdict(arguments[0]), "text": hashlib.sha256(json.dumps(topics).encode()).hexdigest()}
    key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    file = bench_cache() / f"{role}-{key}.safetensors"
    if not file.is_file():
        aside = file.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in make(*arguments).items()}, aside)
        aside.rename(file)
    return load_file(file)


def _teacher(setting: Setting, progress: Progress) -> dict[str, Tensor]:
    model, tokenizer = smollm2()
    train, held_out = _split(conversations(tokenizer, setting.seed), setting)
    labels = _responses(held_out)
    verbalized = _VerbalizedModel(model, setting.teacher_layers, train, setting, progress, "teacher")
    outputs = verbalized.verbalize(verbalized.hidden_states(held_out))
    followed = setting.teacher_layers.index(setting.followed)
    order_outputs = verbalized.verbalize([state[: setting.order_tokens] for state in verbalized.states])
    return {
        "labels": labels,
        "lengths": torch.tensor([len(one.response) for one in held_out]),
        "teacher": outputs.transpose(0, 1),
        "teacher_weight": verbalized.head.weight,
        "teacher_loss": linear_cross_entropy(outputs, verbalized.head, labels) / len(labels),
        "order": _order_by_use(order_outputs, verbalized.head, progress),
        "train_teacher": verbalized.verbalize_one(followed, verbalized.states[followed]),
    }


def _student(setting: Setting, progress: Progress) -> dict[str, Tensor]:
    model, tokenizer = smollm2()
    _add_noise(model, setting)
    train, held_out = _split(conversations(tokenizer, setting.seed), setting)
    labels = _responses(held_out)
    verbalized = _VerbalizedModel(model, setting.student_layers, train, setting, progress, "student")
    eval_states = verbalized.hidden_states(held_out)
    outputs = verbalized.verbalize(eval_states)
    follower = setting.student_layers.index(setting.follower)
    weights = verbalized.ffns[follower].state_dict()
    return {
        "student": outputs.transpose(0, 1),
        "student_weight": verbalized.head.weight,
        "student_loss": linear_cross_entropy(outputs, verbalized.head, labels) / len(labels),
        "train_student": verbalized.states[follower],
        "eval_student": eval_states[follower],
        "norm_weight": model.model.norm.weight,
        **{f"follower.{name}": tensor for name, tensor in weights.items()},
    }


class _VerbalizedModel:
    """A frozen model with verbalizers trained on its target layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        train: Sequence[Conversation],
        setting: Setting,
        progress: Progress,
        role: str,
    ):
        self.model, self.layers, self.progress, self.role = model, layers, progress, role
        self.head = Unembedding(model.lm_head.weight, vocab=len(model.lm_head.weight))
        self.states = self.hidden_states(train)
        width = self.head.weight.shape[1]
        by_layer = initial_verb_ffns(layers, width, "residual", torch.float32, setting.seed)
        self.ffns = nn.ModuleList(by_layer.values())
        self._train(_responses(train), setting)
        self.ffns.requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, texts: Sequence[Conversation]) -> list[Tensor]:
        """Hidden states [T, d] of each target layer and of the normed last layer.

        They are taken at the positions that predict response tokens.
        """
        parts: list[list[Tensor]] = [[] for _ in range(len(self.layers) + 1)]
        for one in self.progress.track(texts, description=f"{self.role}: reading"):
            ids = torch.cat((one.prompt, one.response))[None, :-1]
            states = self.model.model(ids, output_hidden_states=True).hidden_states  # the last of these is normed
            for part, layer in zip(parts, (*self.layers, -1), strict=True):
                part.append(states[layer][0, len(one.prompt) - 1 :].clone())
        return [torch.cat(part) for part in parts]

    def verbalize_one(self, column: int, state: Tensor) -> Tensor:
        """Hidden states of one target layer -> its normed verbalizer outputs [T, d]."""
        return self.model.model.norm(self.ffns[column](state))

    def verbalize(self, states: Sequence[Tensor]) -> Tensor:
        """Hidden states of the target layers, and of the last if given -> normed outputs [layers, T, d]."""
        outputs = [self.verbalize_one(column, states[column]) for column in range(len(self.ffns))]
        return torch.stack([*outputs, *states[len(outputs) :]])

    def _train(self, labels: Tensor, setting: Setting) -> None:
        """Train each verbalizer with cross-entropy; each token is used once, in random order."""
        optimizer = torch.optim.AdamW(self.ffns.parameters(), lr=setting.learning_rate, weight_decay=0.0)
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(setting.seed))
        task = self.progress.add_task(f"{self.role}: verbalizers", total=setting.steps)
        for step, rows in enumerate(shuffled.split(setting.batch)):
            for group in optimizer.param_groups:
                group["lr"] = setting.learning_rate * min(1.0, (step + 1) / setting.warmup) * (1 - step / setting.steps)
            losses = linear_cross_entropy(self.verbalize([s[rows] for s in self.states[:-1]]), self.head, labels[rows])
            optimizer.zero_grad()
            (losses.sum() / len(rows)).backward()
            optimizer.step()
            deepest = losses[-1].item() / len(rows)
            self.progress.update(task, advance=1, description=f"{self.role}: verbalizers, deepest {deepest:.2f} nat")


def _responses(texts: Sequence[Conversation]) -> Tensor:
    return torch.cat([one.response for one in texts])


def _split(texts: Sequence[Conversation], setting: Setting) -> tuple[list[Conversation], list[Conversation]]:
    """(training, evaluation) conversations with exactly the required number of tokens; each last answer is cut."""
    queue = iter(texts)
    return _take(queue, setting.train_tokens), _take(queue, setting.eval_tokens)


def _take(queue: Iterator[Conversation], tokens: int) -> list[Conversation]:
    taken: list[Conversation] = []
    while tokens:
        one = next(queue)
        taken.append(Conversation(one.prompt, one.response[:tokens]))
        tokens -= len(taken[-1].response)
    return taken


@torch.no_grad()
def _add_noise(model: nn.Module, setting: Setting) -> None:
    generator = torch.Generator().manual_seed(setting.seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=setting.noise * float(parameter.std()))


def _order_by_use(outputs: Tensor, head: Unembedding, progress: Progress) -> Tensor:
    use = torch.zeros(head.vocab, dtype=torch.float64)
    for rows in progress.track(outputs.flatten(0, 1).split(512), description="teacher: use of each id"):
        use += head.logits(rows).softmax(1).sum(0, dtype=torch.float64)
    return use.argsort(descending=True)
