"""The shipped demo models, as a user meets them, and the code that trained them."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from data_prep.puzzle_levels import LEVELS
from demo.batches import PuzzleBatches, _box, _move
from demo.build_models import MODELS, PAIRS, ROLES
from demo.evaluation import exact_match, held_out
from demo.plans import PUZZLE_LEVELS
from demo.sizes import SIZES, model_config
from demo.trainable import TrainableModel, patchify
from demo.vocabulary import INPUTS, build_tokenizer, write_processor
from pipeline.vlm.processing import load_processor

SHIPPED = [pair for pair in PAIRS if (MODELS / pair).is_dir()]
FOLDERS = [MODELS / pair / role for pair in SHIPPED for role in ROLES]
PUZZLES = [pair for pair in SHIPPED if pair in PUZZLE_LEVELS]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def batch_of(level):
    return PuzzleBatches(next_share=0.7, level=level).draw(random.Random(0), 6)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_folder_loads_with_its_card(folder):
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    assert model.config.text_config.vocab_size == len(load_processor(folder).tokenizer)
    card = (folder / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card and "exact match" in card


def test_what_the_demo_and_the_wheel_check_need_is_shipped():
    assert {"puzzles", "easy-vqa"} <= set(SHIPPED)


def test_all_folders_together_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 12_000_000


@pytest.mark.parametrize("pair", SHIPPED)
def test_both_models_of_a_pair_read_what_is_written_today(pair, tmp_path):
    write_processor(tmp_path, INPUTS[pair])
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert {(MODELS / pair / role / name).read_bytes() for role in ROLES} == {(tmp_path / name).read_bytes()}


@pytest.mark.parametrize("pair", PUZZLES)
def test_puzzle_teacher_answers_held_out_puzzles(pair):
    assert exact_match(MODELS / pair / "teacher", islice(held_out(pair), 64)) >= 0.9


@pytest.mark.parametrize("pair", PUZZLES)
def test_puzzle_student_has_much_to_learn(pair):
    assert exact_match(MODELS / pair / "student", islice(held_out(pair), 64)) < 0.4


@pytest.mark.parametrize(
    "text", ["What comes next?", "red star with a dot", "is there not a teal shape in the image?", "Zebra fünf ☃ 好\n"]
)
def test_every_text_survives_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[0])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_word_of_the_puzzles_is_one_token():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("red star with a dot") == ["red", "Ġstar", "Ġwith", "Ġa", "Ġdot"]
    deep = build_tokenizer(INPUTS["puzzles-deep"].words)
    assert deep.tokenize(" the sixth tile") == ["Ġthe", "Ġsixth", "Ġtile"]
    assert tokenizer.get_vocab().items() < deep.get_vocab().items()  # the plain words keep their ids


@pytest.mark.parametrize("pair", SHIPPED)
def test_a_picture_becomes_as_many_image_tokens_as_its_card_says(pair):
    processor = load_processor(MODELS / pair / "teacher")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What comes next?"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[next(held_out(pair))[0]]], return_tensors="pt")
    count = inputs["input_ids"][0].tolist().count(processor.image_token_id)
    assert count == INPUTS[pair].image_tokens == {"puzzles": 16, "puzzles-deep": 24, "easy-vqa": 16}[pair]
    assert f" {count} image tokens" in (MODELS / pair / "teacher" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("pair", "row"), [("puzzles", 4), ("puzzles-deep", 6)])
def test_training_pictures_are_what_the_processor_makes_of_the_file(pair, row, tmp_path):
    """Training scales tile by tile, the processor the whole row: they differ by a few levels of 255 at most."""
    picture = next(held_out(pair))[0]
    write_processor(tmp_path, INPUTS[pair])
    tiles = [picture.crop((96 * i, 0, 96 * i + 96, 96)).resize((32, 32), Image.Resampling.BICUBIC) for i in range(row)]
    row = torch.cat([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles], dim=2) / 127.5 - 1
    processed = load_processor(tmp_path).image_processor(images=[picture], return_tensors="pt")
    assert processed["image_grid_thw"].tolist() == [[1, 4, 4 * len(tiles)]]
    assert (patchify(row[None])[0] - processed["pixel_values"]).abs().max() <= 4 / 127.5


def test_moving_a_shape_keeps_it_whole():
    picture = torch.full((3, 8, 8), 0.9)
    picture[:, 2:5, 1:3] = -0.5
    moved = [_move(picture, _box(picture), random.Random(seed)) for seed in range(20)]
    assert _box(picture) == (2, 1, 5, 3)
    assert all(sorted(p.flatten().tolist()) == sorted(picture.flatten().tolist()) for p in moved)
    assert {(b[2] - b[0], b[3] - b[1]) for b in map(_box, moved)} == {(3, 2)}
    assert len({_box(p) for p in moved}) > 5


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_fast_tower_equals_the_model_s_own(level):
    tokenizer, batch = build_tokenizer(), batch_of(level)
    for size in (size for roles in SIZES.values() for size in roles.values()):
        model = Qwen2VLForConditionalGeneration(model_config(size, tokenizer))
        trainable = TrainableModel(model, tokenizer, PuzzleBatches(0.7, level))
        grids = torch.tensor([[1, 4, 4 * LEVELS[level].row]] * len(batch.answers))
        own = model.model.get_image_features(patchify(batch.pictures).flatten(0, 1), grids).pooler_output
        torch.testing.assert_close(trainable.encode_images(batch.pictures), torch.stack(list(own)))
