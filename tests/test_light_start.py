"""Programs answer `--help` at once, and data_prep needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [["data_prep"], ["data_prep", "shard"], ["data_prep", "lint"], ["data_prep", "preview"]]
    + [
        ["pipeline"],
        ["pipeline", "plan"],
        ["pipeline", "evaluate"],
        ["pipeline", "answer"],
        ["pipeline", "trace"],
        ["pipeline", "status"],
        ["pipeline", "watch"],
        ["pipeline", "push"],
        ["pipeline", "cache-info"],
        ["pipeline", "env"],
    ]
    + [[f"launch/{program}.py"] for program in ("train", "cache", "submit", "preflight")],
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
        f"import {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')}\n"
        for path in sorted((ROOT / "data_prep").rglob("*.py"))
        if path.name != "__main__.py"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
