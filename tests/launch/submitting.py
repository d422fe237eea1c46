"""Submit the chain of a recipe to stand-ins for SLURM's commands."""

from launch import submit

# Each call's arguments become a line of calls.txt; the id is the line's number.
SBATCH = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/calls.txt"
[ -z "${FAIL:-}" ] || [[ "$*" != *$FAIL* ]] || { echo "sbatch: error: Invalid qos specification" >&2; exit 1; }
wc -l < "$(dirname "$0")/calls.txt"
"""
SQUEUE = """#!/usr/bin/env bash
[ -z "${SAYS:-}" ] || { echo "slurm_load_jobs error: $SAYS" >&2; exit 1; }
cat "$(dirname "$0")/queue.txt" 2>/dev/null || true
"""
ASKED = ["--nodes", "4", "--time", "24:00:00"]


def put(folder, **commands: str) -> None:
    """Stand-ins for commands, by name."""
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def script(tmp_path, name):
    return (tmp_path / "run" / "jobs" / f"{name}.sbatch").read_text()


def run(recipe, *more):
    return submit.main(["--recipe", str(recipe), *ASKED, *more])
