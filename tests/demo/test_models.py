"""The shipped demo models, as a user meets them, and the code that trained them."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from demo.batches import PuzzleBatches, _box, _move
from demo.build_models import MODELS, PAIRS, ROLES
from demo.evaluation import exact_match, held_out
from demo.sizes import SIZES, model_config
from demo.trainable import TrainableModel, patchify
from demo.vocabulary import build_tokenizer
from pipeline.vlm.processing import load_processor

FOLDERS = [MODELS / pair / role for pair in PAIRS for role in ROLES]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def batch():
    return PuzzleBatches(next_share=0.7).draw(random.Random(0), 6)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_folder_loads_with_its_card(folder):
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    assert model.config.text_config.vocab_size == len(load_processor(folder).tokenizer)
    card = (folder / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card and "exact match" in card


def test_all_folders_together_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_all_models_share_words_and_image_settings(name):
    assert len({(folder / name).read_bytes() for folder in FOLDERS}) == 1


def test_puzzle_teacher_answers_held_out_puzzles():
    assert exact_match(MODELS / "puzzles" / "teacher", islice(held_out("puzzles"), 64)) >= 0.9


def test_puzzle_student_has_much_to_learn():
    assert exact_match(MODELS / "puzzles" / "student", islice(held_out("puzzles"), 64)) < 0.4


@pytest.mark.parametrize(
    "text", ["What comes next?", "red star with a dot", "is there not a teal shape in the image?", "Zebra fünf ☃ 好\n"]
)
def test_every_text_survives_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[0])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_word_of_the_puzzles_is_one_token():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("red star with a dot") == ["red", "Ġstar", "Ġwith", "Ġa", "Ġdot"]


def test_a_picture_becomes_sixteen_image_tokens():
    processor = load_processor(FOLDERS[0])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What comes next?"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for pair in PAIRS:
        inputs = processor(text=[text], images=[[next(held_out(pair))[0]]], return_tensors="pt")
        assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == 16


def test_training_pictures_are_what_the_processor_makes_of_the_file():
    """Training scales tile by tile, the processor the whole row: they differ by a few levels of 255 at most."""
    picture = next(held_out("puzzles"))[0]
    tiles = [picture.crop((96 * i, 0, 96 * i + 96, 96)).resize((32, 32), Image.Resampling.BICUBIC) for i in range(4)]
    row = torch.cat([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles], dim=2) / 127.5 - 1
    processed = load_processor(FOLDERS[0]).image_processor(images=[picture], return_tensors="pt")
    assert processed["image_grid_thw"].tolist() == [[1, 4, 16]]
    assert (patchify(row[None])[0] - processed["pixel_values"]).abs().max() <= 4 / 127.5


def test_moving_a_shape_keeps_it_whole():
    picture = torch.full((3, 8, 8), 0.9)
    picture[:, 2:5, 1:3] = -0.5
    moved = [_move(picture, _box(picture), random.Random(seed)) for seed in range(20)]
    assert _box(picture) == (2, 1, 5, 3)
    assert all(sorted(p.flatten().tolist()) == sorted(picture.flatten().tolist()) for p in moved)
    assert {(b[2] - b[0], b[3] - b[1]) for b in map(_box, moved)} == {(3, 2)}
    assert len({_box(p) for p in moved}) > 5


@torch.no_grad()
def test_fast_tower_equals_the_model_s_own(batch):
    tokenizer = build_tokenizer()
    for size in SIZES.values():
        model = Qwen2VLForConditionalGeneration(model_config(size, tokenizer))
        trainable = TrainableModel(model, tokenizer, PuzzleBatches(0.7))
        grids = torch.tensor([[1, 4, 16]] * len(batch.answers))
        own = model.model.get_image_features(patchify(batch.pictures).flatten(0, 1), grids).pooler_output
        torch.testing.assert_close(trainable.encode_images(batch.pictures), torch.stack(list(own)))
