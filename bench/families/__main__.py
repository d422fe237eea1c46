"""Try every image-text-to-text family of the installed transformers, shrunk and with random weights: is it taken?

make families            all of them; writes docs/families.md
make families ARGS='qwen3_vl gemma3'
"""

from __future__ import annotations

import argparse
import datetime
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bench.families.inputs import probe_rows
from bench.families.shrink import shrunk_config
from pipeline.errors import RecipeError
from pipeline.vlm.families import family
from pipeline.vlm.parts import Parts, decoder_layers, logit_rule, recognise
from pipeline.vlm.probe import check_on, probe_batch

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
LARGEST = 300_000_000
"""Weights of a model that is still shrunk enough to be built."""

EXPLANATION = Path(__file__).with_name("explanation.md")
"""What the page says above its table."""


@dataclass(frozen=True)
class Tried:
    """What became of one family."""

    kind: str
    outcome: str
    """"verified"; "refused", by the pipeline; "not tried", where no small model or no image for it could be made."""
    note: str


def try_family(kind: str) -> Tried:
    """Build a family's small model, find its parts, and check them on a probe."""
    try:
        config = shrunk_config(kind)
        with torch.device("meta"):
            weights = sum(one.numel() for one in AutoModelForImageTextToText.from_config(config).parameters())
        if weights > LARGEST:
            return Tried(kind, "not tried", f"its config still has {weights:,} weights when shrunk")
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        _move_constants(model)
    except Exception as error:  # whatever transformers raises
        return Tried(kind, "not tried", f"no small model: {_short(error)}")
    try:
        parts = recognise(model)
    except RecipeError as error:
        return Tried(kind, "refused", _short(error))
    try:
        image, text = probe_rows(model)
    except Exception as error:
        return Tried(kind, "not tried", f"no image for it: {_short(error)}")
    try:
        check_on(model, probe_batch(image, text), range(1, len(decoder_layers(model))))
    except RecipeError as error:
        return Tried(kind, "refused", _short(error))
    except Exception as error:
        return Tried(kind, "not tried", f"the probe does not run: {_short(error)}")
    return Tried(kind, "verified", _needed(model, parts))


@torch.no_grad()
def _move_constants(model: torch.nn.Module) -> None:
    """What starts at 0 or 1 everywhere, as norms do, would hide an offset, or another norm in its place."""
    for weight in model.parameters():
        if weight.is_floating_point() and weight.numel() > 1 and weight.min() == weight.max():
            weight.add_(torch.randn_like(weight) * 0.1)


def _needed(model: torch.nn.Module, parts: Parts) -> str:
    """What is particular to a verified family."""
    notes = [] if parts.body else ["has no part without its head: the head sees one token"]
    if not parts.norm.endswith(".norm"):
        notes.append(f"its norm is `{parts.norm.rpartition('.')[2]}`")
    rule = logit_rule(model)
    if rule.scale != 1.0:
        notes.append(f"scales its logits by {rule.scale:.4g}")
    if rule.softcap is not None:
        notes.append(f"caps its logits at {rule.softcap:.4g}")
    if any("experts" in name for name, _ in model.named_modules()):
        notes.append("experts")
    if parts.others:
        notes.append(f"{', '.join(f'`{name}`' for name in sorted(parts.others))} never trains")
    if family(model).parts or family(model).may_be_unused:
        notes.append(f"a row in families.py: {family(model).reason}")
    return "; ".join(notes)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).split(" Name it in the recipe")[0]
    said = text if isinstance(error, RecipeError) else f"{type(error).__name__}: {text}"
    return said[:200].replace("|", "/").strip()


def page(tried: list[Tried]) -> str:
    """docs/families.md: what became of every family."""
    count = sum(one.outcome == "verified" for one in tried)
    lines = [
        "# Families",
        "",
        f"Made by `make families` on {datetime.date.today()}, with transformers {transformers.__version__} and torch "
        f"{torch.__version__}: **{count} of {len(tried)}** image-text-to-text families of transformers are verified.",
        "",
        EXPLANATION.read_text(encoding="utf-8"),
        "| family | outcome | what it needed, or why not |",
        "| --- | --- | --- |",
        *(f"| {one.kind} | {one.outcome} | {one.note} |" for one in tried),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the families named on the command line, or all; with all, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "kinds", nargs="*", help="model types; left out: all that transformers has, into docs/families.md"
    )
    kinds = parser.parse_args().kinds
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    tried = []
    for kind in kinds or sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        tried.append(try_family(kind))
        print(f"{tried[-1].kind}: {tried[-1].outcome}{tried[-1].note and f' ({tried[-1].note})'}", flush=True)
    count = sum(one.outcome == "verified" for one in tried)
    print(f"{count} of {len(tried)} families verified, transformers {transformers.__version__}")
    if not kinds:
        PAGE.write_text(page(tried))
    sys.exit(0 if count else 1)


if __name__ == "__main__":
    main()
