"""launch/train.py --stage 2 with time stamps, up to the first update; startup.py runs it in place of launch/train.py.

Writes {phase: [seconds since boot at its end, CPU seconds of this process until then]} to the file named by the
environment variable STAMPS, then exits.
"""

import time

BEGUN = time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time()

import json  # noqa: E402  # nothing before the clock
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
stamps: dict[str, tuple[float, float]] = {}


def stamp(phase: str) -> None:
    stamps.setdefault(phase, (time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time()))


def process_start() -> float:
    """Start of this process, in seconds since boot."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def stamped(call: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        stamp(phase)
        return result

    return wrapped


def exit_after(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        stamp("first update")
        Path(os.environ["STAMPS"]).write_text(json.dumps(stamps), "utf-8")
        os._exit(0)

    return wrapped


def main() -> int:
    stamps["process"] = (process_start(), 0.0)
    stamps["interpreter"] = BEGUN
    from launch import train
    from pipeline.runtime.display.logs import filter_logs

    filter_logs()
    from pipeline.runtime import engine, loop
    from pipeline.steps import interact

    stamp("imports")
    engine.start = stamped(engine.start, "distributed init")
    interact.open_cache_view = stamped(interact.open_cache_view, "cache opened")
    interact.student_with_verbalizers = stamped(interact.student_with_verbalizers, "model loaded")
    interact.Engine = stamped(interact.Engine, "engine")  # type: ignore[misc,assignment]
    loop._Loop.resume_and_load = stamped(loop._Loop.resume_and_load, "data and log opened")  # type: ignore[method-assign]
    loop._Loop.run_update = exit_after(loop._Loop.run_update)  # type: ignore[method-assign]
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
