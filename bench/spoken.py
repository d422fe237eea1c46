"""What a teacher's and a student's layers say: verbalizers trained on a real language model, and their outputs.

T response tokens, J teacher layers, S student layers, d width, V vocabulary. The teacher is SmolLM2-135M-Instruct, the
student the same with noise on its weights. A verbalizer is the project's own: verb-FFN, final norm, frozen head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.conversations import Conversation, conversations
from bench.language_model import PACKAGE, bench_cache, smollm2
from pipeline.loss.linear_ce import linear_cross_entropy
from pipeline.teacher.signal import Unembedding
from pipeline.vlm.verbalizer import VerbFFN, initial_verb_ffns


@dataclass(frozen=True)
class Setting:
    """All that decides the numbers; the bench's cache is keyed by it."""

    teacher_layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26)
    student_layers: tuple[int, ...] = (2, 8, 14, 20, 26)
    noise: float = 0.1
    """Student: standard deviation of the noise on each weight matrix, as a share of the matrix's own."""
    steps: int = 90
    """Updates of each verbalizer."""
    batch: int = 256
    """Tokens an update."""
    eval_tokens: int = 1280
    learning_rate: float = 1e-3
    order_tokens: int = 2560
    """Training tokens from which the teacher's use of each id is taken."""
    follower: int = 14
    """The student layer of the training test ..."""
    followed: int = 20
    """... and the teacher layer that it follows."""
    seed: int = 0
    package: str = PACKAGE

    @property
    def train_tokens(self) -> int:
        """Each training token is seen once."""
        return self.steps * self.batch


@dataclass(frozen=True)
class Spoken:
    """What the bench works on, all float32."""

    setting: Setting
    teacher: Tensor
    """[T, J, d] normed verbalizer outputs on the evaluation tokens; J = the target layers and the last."""
    student: Tensor
    """[T, S + 1, d] the student's."""
    teacher_weight: Tensor
    """[V, d] the teacher's head."""
    student_weight: Tensor
    """[V, d] the student's head."""
    labels: Tensor
    """[T] ids of the evaluation tokens."""
    lengths: Tensor
    """Tokens of each evaluation answer; they sum to T."""
    order: Tensor
    """[V] ids by falling use by the teacher: mean probability over layers and some training tokens."""
    train_teacher: Tensor
    """[T', d] the followed teacher layer's normed verbalizer outputs on the training tokens."""
    train_student: Tensor
    """[T', d] the follower's hidden states on the training tokens, before its verbalizer."""
    eval_student: Tensor
    """[T, d] the same on the evaluation tokens."""
    norm_weight: Tensor
    """[d] of the student's final norm."""
    teacher_loss: Tensor
    """[J] cross-entropy of the evaluation tokens, in nats."""
    student_loss: Tensor
    """[S + 1]."""
    follower: dict[str, Tensor]
    """Weights of the follower's verb-FFN."""

    @property
    def followed(self) -> int:
        """The followed teacher layer's column."""
        return self.setting.teacher_layers.index(self.setting.followed)

    @property
    def unembedding(self) -> Unembedding:
        """The teacher's head."""
        return Unembedding(self.teacher_weight, vocab=len(self.teacher_weight))

    @property
    def student_unembedding(self) -> Unembedding:
        """The student's head."""
        return Unembedding(self.student_weight, vocab=len(self.student_weight))


def spoken(setting: Setting, progress: Progress) -> Spoken:
    """From the bench's cache where it is there; else about ten minutes of one core, once."""
    key = hashlib.sha256(json.dumps(asdict(setting), sort_keys=True).encode()).hexdigest()[:16]
    file = bench_cache() / f"spoken-{key}.safetensors"
    if not file.is_file():
        aside = file.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in _speak(setting, progress).items()}, aside)
        aside.rename(file)
    tensors = load_file(file)
    follower = {name.removeprefix("follower."): tensors.pop(name) for name in list(tensors) if "follower." in name}
    return Spoken(setting=setting, follower=follower, **tensors)


def _speak(setting: Setting, progress: Progress) -> dict[str, Tensor]:
    model, tokenizer = smollm2()
    train, held_out = _split(conversations(tokenizer, setting.seed), setting)
    labels = torch.cat([one.response for one in held_out])
    found: dict[str, Tensor] = {"labels": labels, "lengths": torch.tensor([len(one.response) for one in held_out])}
    for role, layers in (("teacher", setting.teacher_layers), ("student", setting.student_layers)):
        if role == "student":
            _add_noise(model, setting)
        head = Unembedding(model.lm_head.weight, vocab=len(model.lm_head.weight))
        states = _hidden_states(model, train, layers, progress, f"{role}: training tokens")
        eval_states = _hidden_states(model, held_out, layers, progress, f"{role}: evaluation tokens")
        ffns = _train(model, layers, states, torch.cat([one.response for one in train]), setting, progress, role)
        with torch.no_grad():
            said = _verbalize(model, ffns, eval_states)
            loss = linear_cross_entropy(said, head, labels) / len(labels)
        found |= {role: said.transpose(0, 1), f"{role}_weight": head.weight.clone(), f"{role}_loss": loss}
        if role == "teacher":
            layer = layers.index(setting.followed)
            with torch.no_grad():
                some = _verbalize(model, ffns, [state[: setting.order_tokens] for state in states])
                found["train_teacher"] = model.model.norm(ffns[str(setting.followed)](states[layer]))
            found["order"] = _order(some, head, progress)
        else:
            layer = layers.index(setting.follower)
            found |= {"train_student": states[layer], "eval_student": eval_states[layer]}
            found["norm_weight"] = model.model.norm.weight
            weights = ffns[str(setting.follower)].state_dict()
            found |= {f"follower.{name}": tensor for name, tensor in weights.items()}
    return found


def _split(all_of_them: Sequence[Conversation], setting: Setting) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations that hold exactly as many training and evaluation tokens as asked; the last of each is cut."""
    queue = iter(all_of_them)
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


@torch.no_grad()
def _hidden_states(
    model: nn.Module, texts: Sequence[Conversation], layers: Sequence[int], progress: Progress, title: str
) -> list[Tensor]:
    """Of each layer, and of the last one normed: [T, d] at the positions that predict a response token."""
    parts: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    for one in progress.track(texts, description=title):
        ids = torch.cat((one.prompt, one.response))[None, :-1]
        states = model.model(ids, output_hidden_states=True).hidden_states  # the last of these is normed
        for part, layer in zip(parts, (*layers, -1), strict=True):
            part.append(states[layer][0, len(one.prompt) - 1 :].clone())
    return [torch.cat(part) for part in parts]


def _train(
    model: nn.Module,
    layers: Sequence[int],
    states: Sequence[Tensor],
    labels: Tensor,
    setting: Setting,
    progress: Progress,
    role: str,
) -> nn.ModuleDict:
    """One verb-FFN a layer on cross-entropy, each token once in random order; the head's products in bfloat16."""
    width = states[0].shape[1]
    ffns = initial_verb_ffns(layers, width, "residual", torch.float32, setting.seed)
    head = Unembedding(model.lm_head.weight.bfloat16(), vocab=len(model.lm_head.weight))
    optimizer = torch.optim.AdamW(ffns.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(setting.seed))
    task = progress.add_task(f"{role}: verbalizers", total=setting.steps)
    for step, rows in enumerate(shuffled.split(setting.batch)):
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * (1 - step / setting.steps)
        said = _verbalize(model, ffns, [state[rows] for state in states[:-1]])
        losses = linear_cross_entropy(said, head, labels[rows]) / len(rows)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        progress.update(task, advance=1, description=f"{role}: verbalizers, deepest at {losses[-1].item():.2f} nat")
    return ffns.requires_grad_(False)


def _verbalize(model: nn.Module, ffns: nn.ModuleDict, states: Sequence[Tensor]) -> Tensor:
    """Hidden states of the target layers, and of the last where it is given, to normed outputs [layers, T, d]."""
    blocks: list[VerbFFN] = list(ffns.values())  # type: ignore[arg-type]
    said = [model.model.norm(block(state)) for block, state in zip(blocks, states, strict=False)]
    return torch.stack([*said, *states[len(blocks) :]])


def _order(said: Tensor, head: Unembedding, progress: Progress) -> Tensor:
    use = torch.zeros(head.vocab, dtype=torch.float64)
    for rows in progress.track(said.flatten(0, 1).split(512), description="teacher: use of each id"):
        use += head.logits(rows).softmax(1).sum(0, dtype=torch.float64)
    return use.argsort(descending=True)
