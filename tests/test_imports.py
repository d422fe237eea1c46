"""Imports run the way the data runs: each part may know only what the table says, and this test tests itself."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TOPS = ["data_prep", "pipeline", "launch"]
GROUND = [
    "pipeline.errors",
    "pipeline.commands",
    "pipeline.signal",
    "pipeline.rows",
    "pipeline.vocabulary_map",
    "pipeline.recipe",
]
SHARDS = [
    "data_prep.shards",
    "data_prep.schema",
    "data_prep.images",
    "data_prep.atomic",
    "data_prep.storage",
]  # what data_prep offers to those who read shards
PARTS = [*GROUND, *SHARDS, "pipeline.codec", "pipeline.cache", "pipeline.loss", "pipeline.vlm", "pipeline.runtime"]

# The longest prefix of a module that stands here says what of this project it may import, besides itself.
MAY_IMPORT = {
    "data_prep": [],
    "launch": ["pipeline", "data_prep.storage"],
    "pipeline": ["pipeline", "data_prep"],  # the programs on top: job.py, __main__.py
    "pipeline.errors": [],
    "pipeline.commands": [],
    "pipeline.signal": [],
    "pipeline.rows": [],
    "pipeline.vocabulary_map": ["pipeline.signal"],
    "pipeline.recipe": ["pipeline.errors", "data_prep.schema", "data_prep.storage"],  # data may lie behind URLs
    "pipeline.codec": GROUND,
    "pipeline.loss": GROUND,
    "pipeline.cache": [*GROUND, *SHARDS, "data_prep.lock", "pipeline.codec"],  # jobs share its folder
    "pipeline.vlm": [*GROUND, *SHARDS, "pipeline.loss"],
    "pipeline.runtime": [*GROUND, *SHARDS, "pipeline.vlm"],
    "pipeline.steps.teacher_cache": PARTS,  # no step: what two of them need
    "pipeline.steps.verbalize": [*PARTS, "pipeline.steps.teacher_cache"],  # steps are no part of one another
    "pipeline.steps.cache": PARTS,
    "pipeline.steps.interact": [*PARTS, "pipeline.steps.teacher_cache"],
    "pipeline.steps.reinforce": PARTS,
    "pipeline.results": PARTS,
    "pipeline.results.answer": [*PARTS, "pipeline.results", "data_prep.lock"],  # processes share its folder
}
# Packages of others that only these may import.
ONLY = {"deepspeed": ["pipeline.runtime.engine"]}
NEVER = {"data_prep": ["torch", "transformers", "deepspeed"]}


def within(module: str, prefixes: list[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> set[str]:
    """What a file imports, at any depth: of `from a import b` a, or a.b where that is a module or a private name."""
    found = set()
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = root.joinpath(*base.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                is_private = alias.name.startswith("_")
                found.add(f"{base}.{alias.name}" if is_module or is_private else base)
    return found


def violations(root: Path) -> list[str]:
    """`module imports module` for each import that the tables forbid."""
    found = []
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            module = module_name(path, root)
            owner = max((prefix for prefix in MAY_IMPORT if within(module, [prefix])), key=len)
            ours = [owner, *MAY_IMPORT[owner]]
            for name in sorted(imports_of(path, root)):
                is_ours = within(name, TOPS)
                others = within(name, NEVER.get(top, [])) or (
                    name.split(".")[0] in ONLY and module not in ONLY[name.split(".")[0]]
                )
                private = is_ours and name.split(".")[-1].startswith("_")
                if others or private or (is_ours and not within(name, ours)):
                    found.append(f"{module} imports {name}")
    return found


def check_no_circle(root: Path) -> None:
    """Raise graphlib.CycleError where modules import one another in a circle, also inside a folder."""
    graphlib.TopologicalSorter(
        {module_name(path, root): imports_of(path, root) for top in TOPS for path in (root / top).rglob("*.py")}
    ).prepare()


def test_nothing_imports_what_it_may_not_know():
    assert violations(ROOT) == []
    check_no_circle(ROOT)


def test_a_planted_circle_is_caught(tmp_path):
    folder = tmp_path / "pipeline" / "cache"
    folder.mkdir(parents=True)
    (folder / "layout.py").write_text("from pipeline.cache import find\n")
    (folder / "find.py").write_text("def f():\n    from pipeline.cache.layout import command\n")
    assert violations(tmp_path) == []
    with pytest.raises(graphlib.CycleError):
        check_no_circle(tmp_path)


@pytest.mark.parametrize(
    ("module", "line", "imported"),
    [
        ("data_prep.shards", "import torch", "torch"),
        ("data_prep.shards", "from pipeline import errors", "pipeline.errors"),
        ("pipeline.loss.linear_ce", "import pipeline.vlm.backbone", "pipeline.vlm.backbone"),
        ("pipeline.cache.reader", "def f():\n    from ..vlm import families", "pipeline.vlm.families"),
        ("pipeline.steps.interact", "from . import reinforce", "pipeline.steps.reinforce"),
        ("pipeline.steps.interact", "from deepspeed import zero", "deepspeed"),
        ("pipeline.runtime.data.batches", "from pipeline.steps.interact import x", "pipeline.steps.interact"),
        ("pipeline.codec.sampled", "from pipeline.cache import reader", "pipeline.cache.reader"),
        ("pipeline.cache.reader", "from pipeline.cache.layout import _flat", "pipeline.cache.layout._flat"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, module, line, imported):
    def file_of(name):
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    if "." in imported:
        file_of(imported).touch()
    file_of(module).write_text(line + "\n")
    check_no_circle(tmp_path)
    assert violations(tmp_path) == [f"{module} imports {imported}"]
