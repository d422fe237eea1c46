"""Train a student by each method, on equal updates and on equal time, and write the JSON and the table.

    python -m bench.peers                  # half an hour on one core: bench/results/peers.json and docs/peers.md
    python -m bench.peers --size small     # a third of the updates
    python -m bench.peers --size smoke     # four updates, to see that everything runs; writes into its folder alone
    python -m bench.peers --pair real      # the pair with a language model that others trained, after make real-weights

Each command runs alone, on one thread, and is measured by the kernel: its processor seconds and the largest resident
memory, both with start-up. Processor seconds are the wall seconds of a machine that does nothing else. Equal time: a
peer gets as many updates as fit into what stage 1 and interaction took together, by its own seconds for the equal
updates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.ladder.jobs import commit, environment
from bench.peers import methods
from bench.peers.methods import BY_METHOD, METHODS, PAIRS, Pair
from bench.peers.table import write_page
from bench.timing import machine, write_results

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What DeepSpeed's launcher would set, and what would make transformers' Trainer wait for others."""
EQUAL_TIME = ("trainer_finetune", "trainer_gkd_loss")


def main() -> None:
    """`python -m bench.peers`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", choices=PAIRS, default="puzzles", help="the demo's (default), or of make real-weights"
    )
    parser.add_argument("--size", choices=PAIRS["puzzles"].sizes, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, default=Path("build/bench-peers"), help="folder of data and runs")
    options = parser.parse_args()
    pair = PAIRS[options.pair]
    if not pair.model("student").is_dir():
        parser.error(f"--pair {options.pair}: {pair.task.models} has no models: run make real-weights first")
    place = options.place / f"{options.pair}-{options.size}-{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    results = compare(options.pair, options.size, options.seed, place)
    if options.size != "smoke":
        name = "peers" if options.pair == "puzzles" else f"peers_{options.pair}"
        print(f"written: {write_results(name, results)}, {write_page(results)}")
    else:
        (place / "peers.json").write_text(json.dumps(results, indent=2))
        print(f"written: {place / 'peers.json'}")


def compare(pair_name: str, size_name: str, seed: int, place: Path) -> dict[str, Any]:
    """{"machine", "versions", "pair", "size", "methods": {name: figures}, "models": {name: exact match}}."""
    pair = PAIRS[pair_name]
    size = pair.sizes[size_name]
    place.mkdir(parents=True)
    run("data", methods.data_command(pair, size, seed, place / "data"), place)
    stage_1 = run("stage_1", methods.stage_1_command(pair, size, seed, place), place)
    found = {method.name: _train(pair, method.name, size.updates, seed, place) for method in METHODS}
    budget = stage_1["cpu_seconds"] + found["ours_interaction"]["cpu_seconds"]
    longer = {}
    for name in EQUAL_TIME:
        updates = max(1, round(size.updates * budget / found[name]["cpu_seconds"]))
        longer[name] = {"updates": updates, **_train(pair, name, updates, seed, place, f"{name}_equal_time")}
    names = [*found, *(f"{name}_equal_time" for name in longer)]
    run("evaluate", methods.evaluate_command(pair, names, place), place)
    scores = json.loads((place / "evaluation.json").read_text())
    for name, figures in found.items():
        figures |= {"exact_match": scores[name]["exact_match"], "lines": methods.lines_written(pair, BY_METHOD[name])}
        if BY_METHOD[name].stage_1:
            figures["stage_1_cpu_seconds"] = stage_1["cpu_seconds"]
        if name in longer:
            figures["equal_time"] = {**longer[name], "exact_match": scores[f"{name}_equal_time"]["exact_match"]}
    return {
        "machine": machine(),
        "commit": commit(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "deepspeed")},
        "pair": pair_name,
        "size": {**size.__dict__, "seed": seed, "learning_rate": pair.learning_rate},
        "budget_cpu_seconds": budget,
        "stage_1": stage_1,
        "methods": found,
        "models": {name: scores[name]["exact_match"] for name in ("teacher", "untouched")},
        "held_out_interval": {name: [scores[name]["low"], scores[name]["high"]] for name in names},
    }


def _train(pair: Pair, name: str, updates: int, seed: int, place: Path, folder: str = "") -> dict[str, Any]:
    method, folder = BY_METHOD[name], folder or name
    used = run(folder, methods.train_command(pair, method, updates, seed, place, folder), place)
    return {**used, "step_seconds": methods.step_seconds(method, place, folder, place / f"{folder}.log")}


def run(name: str, command: list[str], place: Path) -> dict[str, float]:
    """Run `python COMMAND` and measure it. Raises SystemExit with the end of its log where it fails."""
    print(f"{name} ...", end=" ", flush=True)
    env = environment()
    if command[0] == "-m":
        env = {key: value for key, value in env.items() if key not in RANK_VARIABLES}
    log = place / f"{name}.log"
    begun = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=env)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{name} failed: {log}\n" + "\n".join(log.read_text().splitlines()[-15:]))
    used = {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_seconds": round(time.monotonic() - begun, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }
    print(f"{used['cpu_seconds']} s")
    return used
