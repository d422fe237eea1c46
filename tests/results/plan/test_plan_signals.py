"""What interact holds of the cache, by codec, in bytes counted by hand: the paper's pair on 64 GPUs.

Micro-batches hold 4 samples of 4,096 tokens, 682 of them of a response: T = 2,728; 21 cached layers; d = 8,192 of the
teacher and 3,584 of the student; V = 152,064.
"""

from __future__ import annotations

import json

import pytest
from planning import paper_plan, paper_recipe

from pipeline.results.plan.machine import Machine
from pipeline.results.plan.signals import distribution_bytes

T, J, V, TEACHER, STUDENT = 4 * 682, 21, 152_064, 8192, 3584
MACHINE = Machine(64, 80)


def interact(*overrides):
    return paper_plan(*overrides).plan("interact", MACHINE)


def states(dtype="bfloat16", *more):
    return interact("cache.codec.name=hidden", f"cache.codec.dtype={dtype}", *more)


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        ("{name: hidden, dtype: bfloat16}", 2 * TEACHER),
        ("{name: hidden, dtype: float32}", 4 * TEACHER),
        ("{name: topk, k: 100}", 100 * 12),
        ("{name: topk, k: 999999}", V * 12),
        ("{name: sampled, points: 64}", 64 * 12),
    ],
)
def test_a_distribution_takes_states_or_12_bytes_a_point(codec, size):
    assert distribution_bytes(paper_recipe(f"cache.codec={codec}"), V, TEACHER) == size


def test_all_cached_layers_of_a_micro_batch_are_held():
    assert states("float32").memory.kept - states().memory.kept == T * J * 2 * TEACHER


def test_topk_has_k_ids_and_not_the_sampled_codecs_points():
    few, many = (interact("cache.codec.name=topk", f"cache.codec.k={k}").memory for k in (16, 96))
    assert many.kept - few.kept == T * J * 80 * 12


def test_the_teachers_head_is_sharded_and_gathered_beside_the_students():
    sharded = states().memory.weights - interact().memory.weights
    assert sharded == 2 * V * TEACHER // 64
    more = states().memory.gathered - interact().memory.gathered
    assert more == pytest.approx(2 * V * TEACHER, rel=0.25)  # other modules may be let go earlier for it
    received = states().time.received - interact().time.received
    assert received == pytest.approx(2 * 2 * V * TEACHER * 63 / 64, rel=0.25), "forward, and backward"


def test_below_zero_3_the_head_lies_whole_on_each_gpu(tmp_path):
    config = tmp_path / "zero1.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    plans = [interact(f"interact.deepspeed={config}", f"cache.codec.name={name}") for name in ("sampled", "hidden")]
    assert plans[1].memory.weights - plans[0].memory.weights == 2 * V * TEACHER


def test_exact_losses_have_tiles_of_both_models_logits():
    """A pair's products in bf16 and logits in float32, two logarithms, p and q: 28 bytes for each logit of a chunk."""
    rows = 2**28 // V // 128 * 128
    assert states().memory.working - 28 * rows * V == pytest.approx(2 * 8 * T * STUDENT * 2, rel=1)
    assert states().memory.working > 28 * rows * V


def test_the_head_is_no_part_of_what_the_step_leaves_or_trains():
    assert states().disk == interact().disk and states().memory.optimizer == interact().memory.optimizer
    assert states().memory.gradients == interact().memory.gradients


def test_the_teachers_logits_take_their_products():
    """3 products of the student's head for 2, and the teacher's for 19 candidates, 7 matches and the last layer."""
    plans = [paper_plan(f"cache.codec.name={name}") for name in ("sampled", "hidden")]
    sparse, exact = (plan.operations("interact") for plan in plans)
    student, teacher = (2 * 150 * V * width for width in (STUDENT, TEACHER))
    columns = (exact - sparse - 7 * student) / teacher - 7 - 1
    assert columns == pytest.approx(round(columns)) and 14 <= columns <= 20
