"""launch/train.py under ZeRO-3 with its memory counted: bytes of live tensors at each step's peak, and by cause.

Not a test: test_plan_memory.py runs it. Rank 0 writes {step: {"peak": n, "weights": n, ...}} to the file that the
environment variable MEASURED names. Bytes are those of storages that torch's operations made, as long as they live:
resident memory would count the allocator's and the libraries' too.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launch import train
from pipeline.results.plan.traced import LiveBytes
from pipeline.runtime import loop
from pipeline.steps.cache import teacher_pass

live, measured = LiveBytes(), {}


def lying(engine):
    """Bytes of each cause, from DeepSpeed's own tensors."""
    optimizer, parameters = engine._engine.optimizer, list(engine.module.parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters if p.ds_persist)
    states = [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    return {
        "weights": whole + sum(p.ds_tensor.numel() * p.element_size() for p in parameters),
        "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
        "optimizer": sum(t.nbytes for t in (*optimizer.fp32_partitioned_groups_flat, *states)),
        "buckets": sum(bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values()),
    }


def tell(name, **found):
    measured[name] = found
    if os.environ["RANK"] == "0":
        Path(os.environ["MEASURED"]).write_text(json.dumps(measured))


def measured_train(job, name, training, total, engine, *args, **kwargs):
    live.peak = live.live
    averages = loop_train(job, name, training, total, engine, *args, **kwargs)
    state = engine.trained_state()
    own, whole = sum(span.length for span in state.spans()), sum(state.sizes.values())
    tell(name, peak=live.peak, checkpoint_elements=(own, whole), **lying(engine))
    return averages


def measured_pass(self, loaded, codec):
    live.peak = live.live
    output = encode(self, loaded, codec)
    tell("cache", peak=max(live.peak, measured.get("cache", {"peak": 0})["peak"]))
    return output


loop_train = loop.train
encode, teacher_pass.TeacherPass.encode_response = teacher_pass.TeacherPass.encode_response, measured_pass

if __name__ == "__main__":
    from pipeline.steps import interact, reinforce, verbalize

    for step in (verbalize, interact, reinforce):
        step.train = measured_train
    with live:
        sys.exit(train.main())
