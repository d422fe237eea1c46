"""launch/train.py with a scale: how many bytes of tensors are alive when a step loads its student.

Not a test: test_step_configs.py runs it. Rank 0 appends lines {"step": name, "stage": n, "bytes": n} to the file that
the environment variable SCALE names: "stage" is the ZeRO stage of the engine that the step then makes.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_engine import bytes_alive

from launch import train


def weigh(module, name: str, loader: str) -> None:
    """Wrap a step's loader of its student, and the engine it makes."""
    load, make = getattr(module, loader), module.Engine
    told = {"step": name}

    def weighed(*args, **kwargs):
        told["bytes"] = bytes_alive()
        return load(*args, **kwargs)

    def made(*args, **kwargs):
        engine = make(*args, **kwargs)
        if engine.ranks.first:
            with Path(os.environ["SCALE"]).open("a") as lines:
                lines.write(json.dumps({**told, "stage": engine.stage}) + "\n")
        return engine

    setattr(module, loader, weighed)
    module.Engine = made


if __name__ == "__main__":
    from pipeline.steps import interact, reinforce

    weigh(interact, "interact", "student_with_verbalizers")
    weigh(reinforce, "reinforce", "load_student")
    sys.exit(train.main())
