"""What a model's own folder says of it: its name on the hub, its licence, its languages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_HUB = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)")
_NO_NAME = {"student", "teacher", "model", "snapshots"}
"""Folders whose own name says nothing: the one above is named too."""


@dataclass(frozen=True)
class ModelFacts:
    """A model as its folder shows it."""

    title: str
    """Its name on the hub with the revision, where the folder is the hub's cache; else the folder's name."""
    hub_name: str | None
    card: dict[str, Any]
    """The metadata of its own card; empty where it has none that can be read, or is gone."""

    @property
    def licence(self) -> str:
        """Its licence as its own card states it."""
        stated = self.card.get("license")
        if stated == "other":
            stated = self.card.get("license_name") or "other, without a name"
        return str(stated) if stated else "not stated by the base"


def model_facts(folder: Path) -> ModelFacts:
    """What can be told of a model's folder, without its weights. A folder that is gone has its name alone."""
    card = _metadata(folder / "README.md")
    if found := _HUB.search(folder.resolve().as_posix()) or _HUB.search(folder.as_posix()):
        hub_name = f"{found['owner']}/{found['name']}"
        return ModelFacts(f"{hub_name} at {found['revision'][:12]}", hub_name, card)
    return ModelFacts(folder_name(folder), None, card)


def folder_name(folder: Path) -> str:
    """A folder without what is the machine's own: its name, and the one above where that alone says nothing."""
    parts = [part for part in folder.parts if part not in ("/", "..")]
    return "/".join(parts[-2:] if parts and parts[-1] in _NO_NAME else parts[-1:])


def _metadata(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a model card."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
