"""Reads every wrong input in this process, which has little memory and is watched; prints a JSON line for each.

python tests/faults/fuzzing.py FOLDER SEED
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from fuzz_targets import Case, all_cases  # noqa: E402  # found by the line above

from data_prep.atomic import storage_fault  # noqa: E402
from data_prep.schema import BadSample, DataError  # noqa: E402
from pipeline.errors import SampleError, UserError  # noqa: E402

REFUSALS = (UserError, DataError, SampleError, BadSample)

MEMORY = 2**30
"""Bytes that this process may take beyond what its libraries and good inputs took."""
LIMIT_S = 30
"""Seconds of one input."""
WATCHED = (
    "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class",
)  # fmt: skip


class Hang(BaseException):
    """An input that takes too long."""


class Watch:
    """What this process did that reading data has no need of."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.on = str(folder.resolve()), list[str](), False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in WATCHED:
            self.seen.append(f"{event} {str(args)[:80]}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path, mode, flags = os.path.realpath(os.fsdecode(args[0])), args[1] or "", args[2] or 0
            writes = any(letter in str(mode) for letter in "wxa+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not path.startswith((self.folder, "/dev/")):
                self.seen.append(f"opened {path} {mode}")


def main(folder: Path, cases: Iterable[Case]) -> None:
    """Read all of them. When the first one comes, all is imported: memory counts from there."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "home")
    watch = Watch(folder)
    signal.signal(signal.SIGALRM, _hang)
    told, sys.stdout = sys.stdout, io.StringIO()
    for number, case in enumerate(cases):
        if number == 0:
            _limit_memory()
        outcome, detail = _attempt(case, watch)
        if Path(os.environ["VLSI_FUZZ_CANARY"]).exists():
            outcome, detail = "code ran", detail
            Path(os.environ["VLSI_FUZZ_CANARY"]).unlink()
        line = {"target": case.target, "what": case.what, "outcome": outcome, "detail": detail}
        print(json.dumps(line), file=told, flush=True)


def _attempt(case: Case, watch: Watch) -> tuple[str, str]:
    watch.seen.clear()
    signal.alarm(LIMIT_S)
    watch.on = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = case.read()
        result = "accepted" if case.original is None else "equal" if found == case.original else "silently other"
        outcome = result, ""
    except REFUSALS as error:
        outcome = "refused", str(error)[:300]
    except Hang:
        outcome = "hang", ""
    except MemoryError:
        outcome = "memory", traceback.format_exc()[-600:]
    except BaseException as error:
        if (fault := storage_fault(error)) is not None:  # as the programs say it
            outcome = "refused", fault
        else:
            outcome = f"leaked {type(error).__name__}", traceback.format_exc()[-900:]
    finally:
        watch.on = False
        signal.alarm(0)
    return ("escaped", "; ".join(watch.seen)) if watch.seen else outcome


def _hang(*_: object) -> None:
    raise Hang


def _limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


if __name__ == "__main__":
    main(Path(sys.argv[1]), all_cases(Path(sys.argv[1]), int(sys.argv[2])))
    sys.stdout.flush()
    os._exit(0)
