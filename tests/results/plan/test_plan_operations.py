"""Operations, against torch's own counter on the real modules with real batches."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_families import write_family
from torch.utils.flop_counter import FlopCounterMode

from bench.steps.measures import CPU_ATTENTION_FLOPS
from data_prep.shards import ShardFolder
from pipeline.loss.matching import matching_rule
from pipeline.recipe.schema import Interact, Model, Recipe
from pipeline.results.plan import operations
from pipeline.results.plan.models import planned_model, planned_student
from pipeline.results.plan.operations import Sample
from pipeline.signal import HiddenSignal, SparseSignal, Unembedding
from pipeline.steps.interact import Draw, Interaction
from pipeline.steps.reinforce import Finetuned
from pipeline.vlm.assemble import chat_encoder
from pipeline.vlm.backbone import load_student, load_vlm
from pipeline.vlm.cohost import CoHost
from pipeline.vlm.processing import collate
from pipeline.vlm.verb_ffns import initial_verb_ffns
from pipeline.vlm.verbalizer import StoredHead, VerbalizedVLM

LAYERS = {"teacher": (1, 2, 3, 4), "student": (1, 2)}
ROWS, COUNT = 4096, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair whose products outweigh its norms, and two samples of one length."""
    root = tmp_path_factory.mktemp("operations")
    tiny.write_vlm(root / "teacher", "qwen2_vl", 6, 128, rows=ROWS)
    tiny.write_vlm(root / "student", "qwen2_vl", 3, 96, rows=ROWS)
    return root


def recipe_of(folder, **changes):
    training = {"steps": 1, "batch_size": 2}
    values = {role: Model(path=folder / role, layers=LAYERS[role]) for role in LAYERS}
    interact = Interact(**training, lora_rank=changes.pop("lora_rank", 0))
    data = {"train": folder}
    return Recipe(run=folder, data=data, verbalize=training, interact=interact, reinforce=training, **values, **changes)


@pytest.fixture(scope="module")
def batch(folder):
    """(a batch, its mean sample)."""
    data = ShardFolder(tiny.write_data(folder / "data", COUNT, shards=1))
    encoder = chat_encoder(folder / "student", recipe_of(folder).data)
    raw = data.read(0)
    encoded = encoder(raw.key, raw.record["messages"], raw.images)
    made = collate([encoded] * COUNT, encoder.filler(), 0)
    image = int((encoded.inputs["mm_token_type_ids"] == 1).sum())
    return made, Sample(made.inputs["input_ids"].shape[1], len(made.labels) / COUNT, image)


def verbalized(folder, role, backbone):
    width = backbone.config.get_text_config().hidden_size
    ffns = initial_verb_ffns(LAYERS[role], width, "residual", torch.float32, 0)
    return VerbalizedVLM(backbone, LAYERS[role], ffns, ROWS)


def counted(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
        run()
    return counter.get_total_flops()


def test_verbalize(folder, batch):
    made, sample = batch
    module = CoHost({r: verbalized(folder, r, load_vlm(folder / r, torch.float32)) for r in LAYERS})

    def run():
        losses = module(dict.fromkeys(LAYERS, made))
        sum(loss[:-1].sum() for loss in losses.values()).backward()

    sides = [planned_model(role, Model(path=folder / role, layers=LAYERS[role])) for role in LAYERS]
    assert COUNT * operations.verbalize_operations(sides, ROWS, sample) == pytest.approx(counted(run), rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_stage_2(folder, batch, rank, checkpointing):
    if rank:
        pytest.importorskip("peft")
    made, sample = batch
    recipe = recipe_of(folder, lora_rank=rank, gradient_checkpointing=checkpointing)
    recipe = recipe.model_copy(update={"reinforce": recipe.reinforce.model_copy(update={"lora_rank": rank})})
    planned = planned_student(recipe.student, recipe.interact, recipe.train)
    backbone = load_student(folder / "student", torch.float32, recipe, recipe.interact).train()
    finetuned = Finetuned(backbone, ROWS)
    # With LoRA the first layer's inputs need no gradient. A plan does not subtract that: it is 2 % of these 3 layers.
    near = 0.03 if rank else 0.01
    expected = COUNT * operations.reinforce_operations(planned, recipe, sample)
    assert expected == pytest.approx(counted(lambda: finetuned(made).sum().backward()), rel=near)

    side = verbalized(folder, "student", backbone)
    side.verb_ffns.requires_grad_(False)
    interaction, signal = Interaction(side, None), random_signal(len(made.labels), 5)
    draw = Draw(matching_rule("adaptive"), torch.Generator().manual_seed(0))

    def run():
        losses = interaction(made, lambda _: signal, draw)
        (losses["matched"].sum() + losses["last"]).backward()

    assert COUNT * interact_operations(folder, planned, recipe, sample) == pytest.approx(counted(run), rel=near)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_are_multiplied_with_their_own_experts(tmp_path, checkpointing):
    """Text alone, through a mixture that all trains; its experts weigh three times what a token is multiplied with."""
    folder = write_family(tmp_path / "model", "qwen3_vl_moe", 2, 64)
    student = Model(path=folder, layers=(1,))
    recipe = recipe_of(tmp_path, gradient_checkpointing=checkpointing).model_copy(update={"student": student})
    planned = planned_student(student, recipe.reinforce, recipe.train)
    backbone = load_student(folder, torch.float32, recipe, recipe.reinforce).train()
    backbone.set_experts_implementation("eager")  # torch's counter does not know the grouped product
    ids = torch.randint(200, (1, 128))
    rows = backbone.config.get_text_config().vocab_size
    expected = operations.reinforce_operations(planned, recipe, Sample(128, 128, 0)) - 6 * 128 * 64 * rows
    found = counted(lambda: backbone.model(input_ids=ids).last_hidden_state.sum().backward())
    assert expected == pytest.approx(found, rel=0.03)


def interact_operations(folder, student, recipe, sample):
    teacher = planned_model("teacher", Model(path=folder / "teacher", layers=LAYERS["teacher"]))
    return operations.interact_operations(student, teacher, len(LAYERS["teacher"]), recipe, ROWS, sample)


def test_stage_2_from_cached_states(folder, batch):
    """The teacher's logits too: of each candidate, of each match and of the last layer."""
    made, sample = batch
    recipe = recipe_of(folder, cache={"codec": {"name": "hidden"}})
    planned = planned_student(recipe.student, recipe.interact, recipe.train)
    side = verbalized(
        folder, "student", load_student(folder / "student", torch.float32, recipe, recipe.interact).train()
    )
    side.verb_ffns.requires_grad_(False)
    teacher = Unembedding(torch.randn(ROWS, 128), ROWS)
    signal = HiddenSignal(torch.randn(len(made.labels), 5, 128), teacher)
    draw = Draw(matching_rule("adaptive"), torch.Generator().manual_seed(0))
    interaction = Interaction(side, StoredHead(teacher))

    def run():
        losses = interaction(made, lambda _: signal, draw)
        (losses["matched"].sum() + losses["last"]).backward()

    assert COUNT * interact_operations(folder, planned, recipe, sample) == pytest.approx(counted(run), rel=0.01)
    sparse = COUNT * interact_operations(folder, planned, recipe_of(folder), sample)
    assert sparse < 0.9 * counted(run), "which a plan by points would miss"


def random_signal(tokens, layers, points=16):
    ids = torch.randint(ROWS, (tokens, layers, points))
    probs = torch.full(ids.shape, 1 / points)
    none = torch.zeros(tokens, layers)
    return SparseSignal(ids, probs, none, none - 2.0, has_tail=False)
