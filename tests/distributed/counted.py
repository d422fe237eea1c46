"""launch/train.py with a tally: how often a rank ran a decoder layer's attention, and gathered each whole weight.

Not a test: test_counts.py runs it. Rank 0 writes {"layers": n, "gathered": {name: {"forward": n, "backward": n}}} to
the file that the environment variable TALLY names.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention

from launch import train
from pipeline.runtime import loop

layers, gathered, names = Counter(), Counter(), {}


def tallied_attention(self, *args, **kwargs):
    layers["run"] += 1
    return attention(self, *args, **kwargs)


def tallied_gather(self, params, forward):
    gathered.update((p.ds_id, "forward" if forward else "backward") for p in params)
    return gather(self, params, forward)


def tallied_train(job, name, training, total, made, *args, **kwargs):
    names.update({p.ds_id: name for name, p in made.module.named_parameters() if hasattr(p, "ds_id")})
    layers.clear(), gathered.clear()
    averages = loop_train(job, name, training, total, made, *args, **kwargs)
    if job.ranks.first:
        told = {name: {way: gathered[key, way] for way in ("forward", "backward")} for key, name in names.items()}
        Path(os.environ["TALLY"]).write_text(json.dumps({"layers": layers["run"], "gathered": told}))
    return averages


attention, Qwen2VLAttention.forward = Qwen2VLAttention.forward, tallied_attention
gather = Coordinator._PartitionedParameterCoordinator__all_gather_params
Coordinator._PartitionedParameterCoordinator__all_gather_params = tallied_gather
loop_train = loop.train

if __name__ == "__main__":
    from pipeline.steps import interact, reinforce, verbalize

    for step in (verbalize, interact, reinforce):
        step.train = tallied_train
    sys.exit(train.main())
