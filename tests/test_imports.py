"""Imports run the way the data runs: each part may know only what the table says, and this test tests itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BELOW = ["pipeline.errors", "pipeline.recipe", "pipeline.checks", "pipeline.resolve"]
SIGNAL = "pipeline.teacher.signal"  # types that the teacher's words have: below everything, whoever's folder it is in
PARTS = ["pipeline.vlm", "pipeline.teacher", "pipeline.loss", "pipeline.runtime"]

# The longest prefix of a module that stands here says what of this project it may import, besides itself.
MAY_IMPORT = {
    "data_prep": [],
    "launch": ["pipeline"],
    "pipeline": ["pipeline", "data_prep"],  # the programs on top: job.py, __main__.py
    "pipeline.errors": [],
    "pipeline.recipe": ["pipeline.errors"],
    "pipeline.checks": BELOW,
    "pipeline.resolve": BELOW,
    "pipeline.loss": ["pipeline.errors", SIGNAL],
    "pipeline.teacher": ["pipeline.errors", "data_prep.shards", "data_prep.schema"],
    "pipeline.vlm": [*BELOW, SIGNAL, "pipeline.loss"],
    "pipeline.runtime": [
        *BELOW,
        "data_prep.shards",
        "data_prep.schema",
        "pipeline.vlm.processing",
        "pipeline.vlm.export",
        "pipeline.vlm.lora",
    ],
    "pipeline.steps": [*BELOW, *PARTS, "data_prep.shards"],
    "pipeline.results": [*BELOW, *PARTS, "data_prep.shards", "data_prep.schema"],
}
# Steps are no part of one another: each is one module.
MAY_IMPORT |= {
    f"pipeline.steps.{step}": MAY_IMPORT["pipeline.steps"] for step in ("verbalize", "cache", "interact", "reinforce")
}
MAY_IMPORT["pipeline.steps.rehearsal"] = [*MAY_IMPORT["pipeline.steps"], "pipeline.steps.listening"]
MAY_IMPORT["pipeline.steps.listening"] = MAY_IMPORT["pipeline.steps"]
MAY_IMPORT["pipeline.steps.writing"] = [*MAY_IMPORT["pipeline.steps.rehearsal"], "pipeline.steps.rehearsal"]
MAY_IMPORT["pipeline.steps.cache"] = [*MAY_IMPORT["pipeline.steps.writing"], "pipeline.steps.writing"]
# Packages of others that only these may import.
ONLY = {"deepspeed": ["pipeline.runtime.engine"]}
NEVER = {"data_prep": ["torch", "transformers", "deepspeed"]}


def within(module: str, prefixes: list[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> set[str]:
    """Absolute names that a file imports, at any depth: `from a import b` gives a.b where that is a module."""
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
                found.add(f"{base}.{alias.name}" if is_module else base)
    return found


def violations(root: Path) -> list[str]:
    """`module imports module` for each import that the tables forbid."""
    found = []
    for top in ("data_prep", "pipeline", "launch"):
        for path in sorted((root / top).rglob("*.py")):
            module = module_name(path, root)
            owner = max((prefix for prefix in MAY_IMPORT if within(module, [prefix])), key=len)
            ours = [owner, *MAY_IMPORT[owner]]
            for name in sorted(imports_of(path, root)):
                project = within(name, ["data_prep", "pipeline", "launch"])
                others = within(name, NEVER.get(top, [])) or (
                    name.split(".")[0] in ONLY and module not in ONLY[name.split(".")[0]]
                )
                if others or (project and not within(name, ours)):
                    found.append(f"{module} imports {name}")
    return found


def test_nothing_imports_what_it_may_not_know():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line", "imported"),
    [
        ("data_prep.shards", "import torch", "torch"),
        ("data_prep.shards", "from pipeline import errors", "pipeline.errors"),
        ("pipeline.loss.linear_ce", "import pipeline.vlm.backbone", "pipeline.vlm.backbone"),
        ("pipeline.teacher.store", "def f():\n    from ..vlm import families", "pipeline.vlm.families"),
        ("pipeline.steps.interact", "from . import reinforce", "pipeline.steps.reinforce"),
        ("pipeline.steps.interact", "from deepspeed import zero", "deepspeed"),
        ("pipeline.runtime.batches", "from pipeline.vlm.families import x", "pipeline.vlm.families"),
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
    assert violations(tmp_path) == [f"{module} imports {imported}"]


@pytest.mark.parametrize(
    "command",
    [["data_prep"], ["data_prep", "shard"], ["data_prep", "lint"], ["data_prep", "preview"]]
    + [
        ["pipeline"],
        ["pipeline", "evaluate"],
        ["pipeline", "trace"],
        ["pipeline", "status"],
        ["pipeline", "cache-info"],
    ]
    + [[str(path)] for path in sorted((ROOT / "launch").glob("*.py"))],
    ids=lambda command: "-".join(Path(word).name for word in command),
)
def test_help_answers_without_importing_torch(command):
    """`--help` is asked for often; torch, transformers and datasets take seconds to import."""
    run = "run_path" if command[0].endswith(".py") else "run_module"
    program = f"""
import runpy, sys
sys.argv = {[*command, "--help"]!r}
try:
    runpy.{run}({command[0]!r}, run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "transformers", "deepspeed", "datasets"}} & set(sys.modules)
    sys.exit(end.code or (f"imported {{heavy}}" if heavy else 0))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_data_prep_works_where_torch_is_not_installed():
    program = "import sys; sys.modules['torch'] = None\n" + "".join(
        f"import {module_name(path, ROOT)}\n"
        for path in sorted((ROOT / "data_prep").rglob("*.py"))
        if path.name != "__main__.py"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
