"""The composed pair: a LLaVA of a language model's own layers says what that model says, and comes back from disk."""

from __future__ import annotations

import json

import torch
from PIL import Image
from tiny import byte_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from bench.real import models
from bench.real.learn import jobs
from bench.real.tower import tower_config


def language(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) - 1, hidden_size=24, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
        )
    ).eval()  # fmt: skip


def test_all_layers_say_what_the_language_model_says():
    tokenizer = byte_tokenizer()
    ours = language(tokenizer)
    made = models._compose(ours, range(4), CLIPVisionModel(tower_config()), tokenizer).eval()
    ids = torch.arange(10)[None]
    rows = ours.config.vocab_size
    torch.testing.assert_close(made(input_ids=ids).logits[..., :rows], ours(input_ids=ids).logits)
    assert made.config.text_config.vocab_size % models.PADDED == 0


def test_the_student_has_the_layers_that_it_was_given():
    tokenizer = byte_tokenizer()
    ours = language(tokenizer)
    made = models._compose(ours, (0, 3), CLIPVisionModel(tower_config()), tokenizer)
    layers = made.model.language_model.layers
    assert len(layers) == made.config.text_config.num_hidden_layers == 2
    for layer, place in zip(layers, (0, 3), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, ours.model.layers[place].mlp.up_proj.weight)


def test_a_folder_answers_about_a_picture(tmp_path):
    tokenizer = byte_tokenizer()
    made = models._compose(language(tokenizer), (0, 3), CLIPVisionModel(tower_config()), tokenizer)
    made.save_pretrained(tmp_path)
    models._processor(tokenizer).save_pretrained(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (72, 72)), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    assert model(**inputs).logits.isfinite().all()


def test_the_student_learns_for_a_part_of_the_teachers_updates():
    values = {job.path.name: " ".join(job.command) for job in jobs(600, 2)}
    assert "reinforce.steps=600 " in values["teacher"]
    assert "reinforce.steps=100 " in values["student"]
    assert f"student.path={json.dumps('build/real/base/student')}" in values["student"]
