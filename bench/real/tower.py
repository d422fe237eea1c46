"""A small vision tower, pretrained as towers come from elsewhere: to tell which words a picture's captions have."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench.real.pictures import PICTURES, SIDE, read_index
from bench.real.shard import COLOURS, SHAPES, easy_vqa_questions

MEAN = STD = 0.5
"""Pixels go from -1 to 1, here and in the models' processors."""
COMMON = 3
"""A word is learnt if so many captions have it."""
SHIFT = 6
"""Largest shift of a picture, in pixels: there are few, and each is seen many times."""
BATCH, RATE, REPORT_EVERY = 64, 1e-3, 100


def tower_config() -> CLIPVisionConfig:
    """2.8M parameters, 36 tokens a picture beside the class token."""
    return CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, image_size=SIDE,
        patch_size=12, projection_dim=192,
    )  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """Pictures [N, 3, SIDE, SIDE] in uint8 and, for each, which of the words its captions have [N, words]."""

    pictures: Tensor
    words: Tensor


def train_tower(steps: int, seed: int) -> CLIPVisionModel:
    """Train it on the pictures of the teacher's part, none of them held out; prints progress."""
    torch.manual_seed(seed)
    data, held_out = _labelled("teacher"), _labelled("held_out")
    known = data.words.sum(0) >= COMMON
    model = CLIPVisionModel(tower_config())
    probe = nn.Linear(model.config.hidden_size, int(known.sum()))
    optimizer = torch.optim.AdamW([*model.parameters(), *probe.parameters()], lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    rng, begin = random.Random(seed), time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.tensor(rng.choices(range(len(data.words)), k=BATCH))
        pictures = _shifted(data.pictures[chosen], rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = _read(model, probe, pictures)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), data.words[chosen][:, known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == steps:
            found = _found(model, probe, held_out.pictures, held_out.words[:, known])
            print(
                f"tower {step}/{steps}  loss {loss.item():.4f}  held out: the likeliest word is right in {found:.3f}"
                f"  {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    return model.eval()


def _read(model: nn.Module, probe: nn.Module, pictures: Tensor) -> Tensor:
    """Logits of words, from the mean of the tokens that a language model will see: those of the last layer."""
    states = model(pixel_values=_pixels(pictures), output_hidden_states=True).hidden_states[-1]
    return probe(functional.layer_norm(states[:, 1:], states.shape[-1:]).mean(1))


@torch.no_grad()
def _found(model: nn.Module, probe: nn.Module, pictures: Tensor, words: Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        best = _read(model, probe, pictures).argmax(1)
    return float(words[torch.arange(len(words)), best].mean())


def _pixels(pictures: Tensor) -> Tensor:
    return (pictures.float() / 255 - MEAN) / STD


def _shifted(pictures: Tensor, rng: random.Random) -> Tensor:
    """The batch moved by some pixels, white where it came from."""
    padded = functional.pad(pictures, (SHIFT,) * 4, value=255)
    top, left = rng.randrange(2 * SHIFT + 1), rng.randrange(2 * SHIFT + 1)
    return padded[:, :, top : top + SIDE, left : left + SIDE]


def _labelled(part: str) -> Labelled:
    """Stamps and emoji of a part by caption and group, and easy-VQA's pictures by shape and colour."""
    drawn = [(PICTURES / one.file, f"{one.caption} {one.group}", one.part) for one in read_index()]
    texts = [text for _, text, _ in drawn] + list(SHAPES + COLOURS)
    place = {word: number for number, word in enumerate(sorted({word for text in texts for word in _words(text)}))}
    named = [(path, text) for path, text, of in drawn if of == part] + _easy_vqa(part)
    words = torch.zeros(len(named), len(place))
    for row, (_, text) in enumerate(named):
        words[row, [place[word] for word in _words(text)]] = 1
    return Labelled(torch.stack([_picture(path) for path, _ in named]), words)


def _easy_vqa(part: str) -> list[tuple[Path, str]]:
    """The pictures of which both shape and colour are asked for, with these two words."""
    answers: dict[Path, set[str]] = {}
    for asked in [*easy_vqa_questions(part, "shape"), *easy_vqa_questions(part, "color")]:
        answers.setdefault(asked.folder / asked.file, set()).add(asked.answer)
    return [(path, " ".join(sorted(found))) for path, found in answers.items() if len(found) == 2]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _picture(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
