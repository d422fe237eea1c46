"""What no linter says about this code: functions stay short and files are one idea."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_FUNCTION = 60
LONGEST_FILE = 400


def sources():
    return [path for top in ("data_prep", "pipeline", "launch") for path in sorted((ROOT / top).rglob("*.py"))]


def test_functions_and_files_stay_short():
    long = []
    for path in sources():
        text = path.read_text()
        if len(text.splitlines()) > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                long.append(
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
                )
    assert long == []
