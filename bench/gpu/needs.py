"""The packages that the checks import, besides the standard library and what comes with torch and Triton.

    python -m bench.gpu.needs            their names with the versions of constraints.txt, for pip download

A machine without a network has some of them, and perhaps old ones. All that are missing are named at once, before a
check starts.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS: Mapping[str, str] = {
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "huggingface-hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "msgpack": "msgpack",
    "numpy": "numpy",
    "packaging": "packaging",
    "pillow": "PIL",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pytest": "pytest",
    "pytest-timeout": "pytest_timeout",
    "pyyaml": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "zstandard": "zstandard",
}
"""{name as pip knows it: what is imported}: by this project's own code."""
THEIRS: Mapping[str, str] = {
    "absl-py": "absl",
    "annotated-types": "annotated_types",
    "anyio": "anyio",
    "cycler": "cycler",
    "einops": "einops",
    "fonttools": "fontTools",
    "h11": "h11",
    "hjson": "hjson",
    "httpcore2": "httpcore2",
    "httpx2": "httpx2",
    "idna": "idna",
    "iniconfig": "iniconfig",
    "kiwisolver": "kiwisolver",
    "pluggy": "pluggy",
    "protobuf": "google.protobuf",
    "pydantic-core": "pydantic_core",
    "pygments": "pygments",
    "pyparsing": "pyparsing",
    "python-dateutil": "dateutil",
    "regex": "regex",
    "six": "six",
    "tqdm": "tqdm",
    "truststore": "truststore",
    "typing-inspection": "typing_inspection",
}
"""The same of what those import, in the versions of constraints.txt: another version may need others."""
NEEDED = {**OURS, **THEIRS}
OF_ONE_VERSION = ("deepspeed", "transformers")
"""With versions that setup.cfg does not take nothing works; with others' it may."""


def missing() -> list[str]:
    """What the checks cannot do without: "NAME>=2", or "NAME>=2 (1.5 is there)"."""
    absent = [name for name, module in NEEDED.items() if not _is_there(module)]
    wanted = _wanted()
    found = [wanted.get(name, name) for name in absent if name in OURS]
    found += [one for one in old() if one.startswith(OF_ONE_VERSION)]
    asked = set(THEIRS) if found else _asked_for()  # of a package that is not there nobody knows what it asks for
    return found + [name for name in absent if name in THEIRS and name in asked]


def old() -> list[str]:
    """What is there in a version that setup.cfg does not take: "NAME>=2 (1.5 is there)"."""
    if not _is_there("packaging"):
        return []
    from packaging.specifiers import SpecifierSet

    found = []
    for name, requirement in _wanted().items():
        version = _version(name)
        if name in OURS and version and version not in SpecifierSet(requirement.removeprefix(name)):
            found.append(f"{requirement} ({version} is there)")
    return found


def pinned() -> Iterator[str]:
    """NAME==VERSION of each, as constraints.txt has it for the newest Python."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lines, re.MULTILINE))
    return (f"{name}=={versions[name]}" for name in NEEDED)


def _wanted() -> dict[str, str]:
    """{name: NAME>=VERSION} of what setup.cfg asks for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return {_name(line): line for line in config["options"]["install_requires"].split()}


def _asked_for() -> set[str]:
    """What the packages at hand ask for, of themselves and without extras."""
    lines = (line for name in NEEDED if _version(name) for line in metadata.requires(name) or [])
    return {_name(line) for line in lines if "extra ==" not in line}


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(*pinned())
