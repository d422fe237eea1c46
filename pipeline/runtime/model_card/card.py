"""Write the model card: metadata that the hub reads, and the run's facts as text.

It names folders by their last name alone, so that a card can be published without telling of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from data_prep.schema import DataError, parse_json
from data_prep.shards import read_manifest, write_file
from data_prep.storage import is_url
from pipeline.recipe.resolve import load_recipe
from pipeline.recipe.schema import Data, Recipe, StudentTraining
from pipeline.runtime.folder import done
from pipeline.runtime.model_card.base import ModelFacts, folder_name, model_facts
from pipeline.runtime.versions import read_environment

NAME = "README.md"
WRITTEN = (
    "<!-- Written by VLsI from the run's files, and again when there are new results. Remove this line to keep -->"
)
"""The line by which a card is known that may be written again."""
_TEMPLATE = Path(__file__).with_name("model_card.md")
MEASURED = {"exact_match", "low", "high", "samples"}
TASK = "image-text-to-text"


def write_card(run: Path, folder: Path) -> bool:
    """Write FOLDER/README.md, for the student of a run; returns whether. A card that someone made their own stays.

    Raises RecipeError where `run` has no recipe.yaml.
    """
    path = folder / NAME
    own = path.is_file() and model_card_is_own(path, load_recipe(run / "recipe.yaml").recipe)
    if not own:
        write_file(path, model_card(run).encode())
    return not own


def model_card_is_own(path: Path, recipe: Recipe) -> bool:
    """Whether a card is neither one that was written here nor the base's, which was copied along."""
    text = path.read_bytes()
    base = recipe.student.path / NAME
    return WRITTEN.encode() not in text and not (base.is_file() and base.read_bytes() == text)


def model_card(run: Path) -> str:
    """The text of the card."""
    from huggingface_hub import ModelCard

    recipe = load_recipe(run / "recipe.yaml").recipe
    base, teacher = model_facts(recipe.student.path), model_facts(recipe.teacher.path)
    evaluation = _evaluation(run)
    card = ModelCard.from_template(
        _metadata(run, recipe, base, evaluation),
        template_path=str(_TEMPLATE),
        written=WRITTEN,
        name=_name(run, base),
        base=base,
        teacher=teacher,
        licence=base.licence,
        trained=list(_trained(run, recipe)),
        limits=", ".join(_limits(recipe.data)),
        pixel_arguments=", ".join(f"{name}={value}" for name, value in _pixels(recipe.data).items()),
        evaluation=[_row(run, name, result) for name, result in evaluation.items()],
        unlike=len({one["response_tokens"] for one in evaluation.values() if one.get("response_tokens")}) > 1,
        held_out=", ".join(dict.fromkeys(_data_name(result) for result in evaluation.values())),
        data=list(_data(recipe)),
        recipe=_recipe_text(recipe),
        environment=list(_environment(run)),
    )
    return str(card)


def _metadata(run: Path, recipe: Recipe, base: ModelFacts, evaluation: Mapping[str, Mapping[str, Any]]) -> Any:
    """What the hub reads; the licence and the languages are the base's, where its card states them."""
    from huggingface_hub import EvalResult, ModelCardData

    of_student = [result for result in evaluation.values() if _is_student(run, result)]
    results = [
        EvalResult(TASK, "vlsi-shards", _data_name(one), "exact_match", one["exact_match"]) for one in of_student
    ]
    kept = {
        name: base.card[name] for name in ("license", "license_name", "license_link", "language") if name in base.card
    }
    return ModelCardData(
        base_model=base.hub_name,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["vlsi", "distillation", "arxiv:2412.01822"],
        model_name=_name(run, base),
        eval_results=results or None,
        **kept,
    )


def _name(run: Path, base: ModelFacts) -> str:
    return f"{base.hub_name or base.title}, distilled in {run.resolve().name}"


def _trained(run: Path, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(step, what it did) of the steps that trained the student."""
    for step in ("interact", "reinforce"):
        settings: StudentTraining = getattr(recipe, step)
        # the step that writes the card is marked as done after it: then what the recipe plans is what was done
        summary = done(run / step) or {
            "updates": settings.steps if settings.steps is not None else f"{settings.epochs} epochs"
        }
        updates = summary["updates"]
        how = f", LoRA of rank {settings.lora_rank}, merged" if settings.lora_rank else ""
        unit = "" if isinstance(updates, str) else " updates"
        yield step, "left out" if updates == 0 else f"{updates}{unit} of {settings.batch_size} samples{how}"


def _limits(data: Data) -> Iterator[str]:
    """How large samples were at most, in words."""
    yield f"chats of at most {data.max_length:,} tokens"
    for name, value in _pixels(data).items():
        yield f"pictures of at {'least' if name == 'min_pixels' else 'most'} {value:,} pixels"


def _pixels(data: Data) -> dict[str, int]:
    """The limits that the recipe sets on pictures, under the names that Qwen's processors take, too."""
    limits = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    return {name: value for name, value in limits.items() if value is not None}


def _evaluation(run: Path) -> Mapping[str, Mapping[str, Any]]:
    """Model -> its results, of what `evaluate` has written into the run's folder."""
    path = run / "evaluation.json"
    found = parse_json(path.read_bytes()) if path.is_file() else {}
    return {name: result for name, result in found.items() if result.keys() >= MEASURED}


def _is_student(run: Path, result: Mapping[str, Any]) -> bool:
    return Path(result.get("model", "")).resolve() == (run / "student").resolve()


def _row(run: Path, name: str, result: Mapping[str, Any]) -> dict[str, str]:
    perplexity = result.get("perplexity")
    return {
        "name": f"**{name}** (this model)" if _is_student(run, result) else name,
        "share": f"{result['exact_match']:.1%}",
        "interval": f"{100 * result['low']:.1f} to {100 * result['high']:.1f}",
        "perplexity": "-" if perplexity is None else f"{perplexity:#.4g}",
        "samples": f"{result['samples']:,}",
    }


def _data_name(result: Mapping[str, Any]) -> str:
    path = Path(result.get("data", "held-out data"))
    return "/".join(path.parts[-2:])


def _data(recipe: Recipe) -> Iterator[str]:
    """A line for each folder of training data: its source and counts, as its manifest has them."""
    for folder in (recipe.data.train, *dict.fromkeys(recipe.own_folders().values())):
        name = "/".join(folder.parts[-2:])
        try:
            manifest = read_manifest(folder)
        except DataError:
            yield f"`{name}`: its manifest was not there when this was written"
            continue
        answered = manifest.get("answered", {})
        provenance = manifest.get("provenance") or answered.get("data_provenance") or {}
        said = [
            f"{manifest['samples']:,} samples",
            *(["answers given by a model"] if answered else []),
            f"source `{provenance.get('source', 'not stated')}`",
        ]
        said += [f"{key} {provenance[key]}" for key in ("rejected", "noise", "seed") if key in provenance]
        yield f"`{name}`: {', '.join(said)}; {manifest.get('checksum', 'no checksum')}"


def _recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, without defaults, a path or URL by its folder's name."""
    return yaml.safe_dump(
        _shortened(recipe.model_dump(exclude_defaults=True)), sort_keys=False, default_flow_style=None
    )


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if is_url(value):
        return value.name
    if isinstance(value, Path):
        return folder_name(value) if value.is_absolute() else str(value)
    return list(value) if isinstance(value, tuple) else value


def _environment(run: Path) -> Iterator[str]:
    """Lines on the newest step that trained the student: code, device, packages."""
    found = read_environment(run, "reinforce") or read_environment(run, "interact")
    if found is None:
        return
    yield f"VLsI {found['version']}, commit {found['commit']}"
    yield f"{found['ranks']} ranks on {found['device']}, Python {found['python']}"
    shown = [name for name in ("torch", "deepspeed", "transformers", "peft") if name in found["packages"]]
    yield ", ".join(f"{name} {found['packages'][name]}" for name in shown)
