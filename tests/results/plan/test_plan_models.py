"""Numbers of parameters, from config files alone: the paper's counts come out, and those of real modules."""

import pytest
from planning import CONFIGS, paper_plan
from tiny_families import MIXTURE, write_family
from transformers import AutoModelForImageTextToText

from pipeline.errors import RecipeError
from pipeline.recipe.schema import Interact, Model
from pipeline.results.plan.models import planned_model, planned_student
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.lora import add_lora
from pipeline.vlm.parts import image_parts, lm_head, set_trainable


def vision_elements(model) -> int:
    """Parameters that only images reach: the vision tower and the projectors."""
    inside = [model.module.get_submodule(name) for name in image_parts(model.module)]
    return sum({id(p): p.numel() for part in inside for p in part.parameters()}.values())


def test_the_papers_counts_come_out():
    """Table 4f: 269M in the 7 verb-FFNs of the 7B; by the same formula 4.0B in the 20 of the 72B."""
    planned = paper_plan()
    student, teacher = (
        sum(p.elements for p in side.verb_ffns("paper", True)) for side in (planned.student, planned.teacher)
    )
    assert student == 7 * 3 * 3584**2 and student // 10**6 == 269
    assert teacher == 20 * 3 * 8192**2 and round(teacher / 1e9, 1) == 4.0
    # Qwen2-VL's technical report: a 675M tower beside language models of 7.6B and 72B.
    assert round(vision_elements(planned.student) / 1e6) == 676
    assert round((planned.student.elements() - vision_elements(planned.student)) / 1e9, 1) == 7.6
    assert round((planned.teacher.elements() - vision_elements(planned.teacher)) / 1e9, 1) == 72.7


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision"])
def test_counts_are_those_of_the_loaded_model(tiny_models, kind):
    folder = tiny_models[kind, "teacher"]
    real = AutoModelForImageTextToText.from_pretrained(folder)
    planned = planned_model("teacher", Model(path=folder))
    assert planned.elements() == sum(p.numel() for p in real.parameters())
    assert [p.elements for p in planned.parameters()] == [p.numel() for p in real.parameters()]


def test_a_token_is_multiplied_with_the_experts_that_it_goes_to_and_memory_has_all_of_them(tmp_path):
    """Two layers of width 32, by hand: queries, keys, values, output; the router; 2 of 6 experts of three matrices."""
    planned = planned_model("teacher", Model(path=write_family(tmp_path, "qwen3_vl_moe", 2), layers=(1,)))
    attention, router, expert = 32 * (32 + 16 + 16 + 32), 6 * 32, 3 * 24 * 32
    assert (MIXTURE["num_experts_per_tok"], MIXTURE["num_experts"]) == (2, 6)
    assert planned.decoder_elements() == pytest.approx(2 * (attention + router + 2 * expert))
    held = sum(p.elements for p in planned.parameters() if ".layers." in p.module and p.module.endswith("experts"))
    assert held == 2 * 6 * expert and planned.dense_layers == 0


@pytest.mark.parametrize(("rank", "targets"), [(0, None), (4, None), (4, ("q_proj", "v_proj"))])
def test_what_trains_is_what_the_step_trains(tiny_models, rank, targets):
    pytest.importorskip("peft")
    folder = tiny_models["qwen2_vl", "student"]
    real = load_vlm(folder, None)
    training, train = Interact(batch_size=1, lora_rank=rank, lora_targets=targets), ("decoder", "projector")
    add_lora(real, training, seed=0) if rank else set_trainable(real, train)
    planned = planned_student(Model(path=folder), training, train)
    assert [(p.elements, p.trained) for p in planned.parameters()] == [
        (p.numel(), p.requires_grad) for p in real.parameters()
    ]


def test_a_folder_with_config_json_alone_is_enough_and_without_it_the_error_says_so(tmp_path):
    (tmp_path / "config.json").write_bytes((CONFIGS / "qwen2_vl_2b" / "config.json").read_bytes())
    module = planned_model("student", Model(path=tmp_path)).module
    assert lm_head(module).weight is module.get_input_embeddings().weight
    with pytest.raises(
        RecipeError, match=r"nowhere/config.json: a plan needs each model's config.json.*--set teacher.path"
    ):
        planned_model("teacher", Model(path=tmp_path / "nowhere", layers=(1,)))
