"""The response mask is the assistant's words and the end-of-turn token, nothing else; truncation keeps images whole."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from running import tiny_recipe
from tiny import KINDS, MORE_KINDS, chats, png, turn
from tokenizers.processors import TemplateProcessing
from transformers.utils import is_torchvision_available

from pipeline.errors import RecipeError, SampleError
from pipeline.recipe.resolve import load_recipe
from pipeline.vlm.assemble import encoders
from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.processing import ChatEncoder, collate, decode_image, load_processor


@pytest.fixture(params=KINDS + MORE_KINDS)
def encoder(request, tiny_models) -> ChatEncoder:
    return ChatEncoder(load_processor(tiny_models[request.param, "student"]), max_length=512)


def response_text(encoder: ChatEncoder, encoded) -> str:
    return encoder.processor.tokenizer.decode(encoded.response_ids)


def image_ids(encoder: ChatEncoder, encoded) -> torch.Tensor:
    return encoded.inputs["input_ids"][0] == encoder.processor.image_token_id


def test_one_turn(encoder):
    encoded = encoder("k", [turn("user", "<image>", "what?"), turn("assistant", "a red star")], [png()])
    assert response_text(encoder, encoded) == "a red star<|im_end|>"
    assert encoded.inputs["input_ids"].shape[1] == len(encoded.response)


def test_many_turns_and_images_and_a_system_prompt(encoder):
    messages = [
        turn("system", "be brief"),
        turn("user", "<image>", "and", "<image>", "differ how?"),
        turn("assistant", "in colour"),
        turn("user", "sure? in colour", "<image>"),
        turn("assistant", "yes, in colour. ünïcödé ✓"),
    ]
    encoded = encoder("k", messages, [png(seed=1), png(size=(84, 56), seed=2), png(seed=3)])
    assert response_text(encoder, encoded) == "in colour<|im_end|>yes, in colour. ünïcödé ✓<|im_end|>"
    assert not (encoded.response & image_ids(encoder, encoded)).any()


def test_the_mask_is_the_templates_own_difference(encoder):
    """Independently: tokens of the chat up to the prompt are the prefix, what follows up to end-of-turn is masked."""
    messages = [turn("user", "<image>", "what?"), turn("assistant", "ab ab")]
    encoded = encoder("k", messages, [png()])
    prompt = encoder.prompt(messages[:1], [png()])["input_ids"][0]
    ids = encoded.inputs["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)
    end = len(prompt) + len("ab ab") + 1
    assert encoded.response.nonzero()[:, 0].tolist() == list(range(len(prompt), end))


def test_pixels_in_the_models_dtype_are_those_that_the_device_would_round(encoder):
    """Padding (LLaVA-OneVision's tiles differ in number) and concatenation commute with the cast: bitwise equal."""
    early = ChatEncoder(encoder.processor, 512, dtype=torch.bfloat16)
    samples = [chats(6)[0], ("wide", {"messages": [turn("user", "<image>", "?"), turn("assistant", "a")]}, None)]
    batches = []
    for each in (encoder, early):
        encoded = [each(key, record["messages"], images or [png(size=(120, 40))]) for key, record, images in samples]
        batches.append(collate(encoded, each.filler(), pad_id=0))
    late, ready = batches
    floats = [name for name, value in late.inputs.items() if value.is_floating_point()]
    assert "pixel_values" in floats and all(ready.inputs[name].dtype == torch.bfloat16 for name in floats)
    assert all(2 * ready.inputs[name].nbytes == late.inputs[name].nbytes for name in floats)
    late, ready = (batch.to("cpu", torch.bfloat16) for batch in batches)
    assert all(torch.equal(late.inputs[name], ready.inputs[name]) for name in late.inputs)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_recipes_encoders_give_pixels_in_its_precision(tiny_models, tmp_path, precision, dtype):
    path = tiny_recipe(tmp_path, tiny_models, "qwen2_vl", tmp_path, precision=precision)
    made = encoders(load_recipe(path).recipe, ["teacher", "student"])
    assert [made[role].filler().inputs["pixel_values"].dtype for role in made] == [dtype, dtype]


def test_text_alone_gets_a_filler_row_that_counts_nothing(encoder):
    (_, record, images) = chats(5)[4]
    encoded = encoder("k", record["messages"], images)
    batch = collate([encoded], encoder.filler(), pad_id=0)
    assert "pixel_values" in batch.inputs and batch.inputs["input_ids"].shape[0] == 2
    assert (
        batch.counts == (int(encoded.response.sum()),) and len(batch.labels) == len(batch.positions) == batch.counts[0]
    )
    assert int(batch.positions.max()) < batch.inputs["input_ids"].shape[1]


def test_positions_predict_labels(encoder):
    encoded = [encoder(key, record["messages"], images) for key, record, images in chats(6)]
    batch = collate(encoded, encoder.filler(), pad_id=0)
    following = batch.inputs["input_ids"].flatten()[batch.positions + 1]
    assert torch.equal(following, batch.labels)
    assert sum(batch.counts) == len(batch.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_never_cuts_inside_an_image(kind, tiny_models):
    folder = tiny_models[kind, "student"]
    model, processor = load_vlm(folder, torch.float32), load_processor(folder)
    messages = [turn("user", "<image>", "first?"), turn("assistant", "one"), turn("user", "<image>", "second?")]
    messages.append(turn("assistant", "two"))
    pictures = [png(seed=1), png(seed=2)]
    whole = ChatEncoder(processor, 512)
    everything = whole("k", messages, pictures)
    said, kept = set(), set()
    for max_length in range(10, everything.inputs["input_ids"].shape[1] + 1):
        encoder = ChatEncoder(processor, max_length)
        try:
            cut = encoder("k", messages, pictures)
        except SampleError as error:
            assert f"no response token within max_length={max_length}" in str(error)
            continue
        assert cut.inputs["input_ids"].shape[1] <= max_length
        assert response_text(whole, everything).startswith(response_text(encoder, cut))
        model.model(**cut.inputs)  # refuses inputs whose image tokens and image features do not agree
        said.add(response_text(encoder, cut))
        kept.add(len(cut.inputs["image_grid_thw" if kind == "qwen2_vl" else "image_sizes"]))
    # LLaVA-OneVision tiles a picture that stands alone: without the second, the first no longer fits either.
    assert kept == ({1, 2} if kind == "qwen2_vl" else {2})
    assert {"one<|im_end|>", "one<|im_end|>two<|im_end|>"} <= said


def test_refusals(encoder):
    with pytest.raises(SampleError, match=r"control token <\|im_end\|>"):
        encoder("k", [turn("user", "hi<|im_end|>"), turn("assistant", "x")], [])
    with pytest.raises(SampleError, match="image cannot be decoded"):
        encoder("k", [turn("user", "<image>", "?"), turn("assistant", "x")], [b"no image"])
    with pytest.raises(SampleError, match="assistant turn 1 is empty"):
        encoder("k", [turn("user", "hi"), turn("assistant", " ")], [])


def test_a_template_without_end_of_turn_is_refused(encoder):
    encoder.processor.chat_template = encoder.processor.chat_template.replace("<|im_end|>", "")
    with pytest.raises(SampleError, match="no end-of-turn token"):
        encoder("k", [turn("user", "hi"), turn("assistant", "x")], [])
    with pytest.raises(RecipeError, match="not even a question and an answer: .* no end-of-turn token"):
        encoder.check()


def test_what_a_processor_raises_for_one_sample_rejects_that_sample(encoder):
    """Qwen2-VL's image processor raises ValueError above an aspect ratio of 200."""
    encoder.check()
    long = [turn("user", "<image>", "what?"), turn("assistant", "a line")], [png(size=(2001, 10))]
    if "pixel_values" in encoder("k", *_chat()).inputs and hasattr(encoder.processor.image_processor, "merge_size"):
        with pytest.raises(SampleError, match=r"processor refused it: ValueError: absolute aspect ratio"):
            encoder("k", *long)
        with pytest.raises(SampleError, match=r"processor refused it: ValueError: absolute aspect ratio"):
            encoder.prompt(long[0][:1], long[1])
    else:
        assert encoder("k", *long).response.any()


def test_each_image_part_needs_its_image(encoder):
    asked, answered = _chat()[0]
    for images in ([], [png(), png()]):
        with pytest.raises(SampleError, match=rf"1 image part\(s\), and {len(images)} image\(s\) came with it"):
            encoder("k", [asked, answered], images)
        with pytest.raises(SampleError, match=r"1 image part\(s\)"):
            encoder.prompt([asked], images)
    template = encoder.processor.chat_template
    encoder.processor.chat_template = template.replace("c['type']=='image'", "c['type']=='image' and loop.first")
    two = [turn("user", "<image>", "<image>", "what?"), answered]
    with pytest.raises(SampleError, match="keeps the places of 1 of 2 images|processor refused it"):
        encoder("k", two, [png(), png()])


def test_a_programming_error_is_nobodys_sample(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "_turns", None)
    with pytest.raises(TypeError):
        encoder("k", *_chat())


def _chat():
    return [turn("user", "<image>", "what?"), turn("assistant", "x")], [png()]


@pytest.fixture
def doubling(tiny_models):
    """A processor as Gemma 3's: the chat template writes the BOS token, and the tokenizer adds it."""
    processor = load_processor(tiny_models["llava", "student"])
    processor.tokenizer.bos_token = "<|vision_start|>"
    bos = ("<|vision_start|>", processor.tokenizer.bos_token_id)
    add = TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos])
    processor.tokenizer.backend_tokenizer.post_processor = add
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor


@pytest.mark.parametrize("pictures", [0, 1])
def test_a_bos_token_stands_once(doubling, pictures):
    """As transformers' own apply_chat_template(tokenize=True) has it."""
    encoder, bos = ChatEncoder(doubling, 512), doubling.tokenizer.bos_token_id
    data = [png(seed=1)] * pictures
    messages = [turn("user", *["<image>"] * pictures, "what?"), turn("assistant", "a red star")]
    encoded = encoder("k", messages, data)
    shown = [{"type": "image", "image": decode_image(one)} for one in data]
    question = {"role": "user", "content": [*shown, {"type": "text", "text": "what?"}]}
    theirs = doubling.apply_chat_template([question, messages[1]], tokenize=True, return_dict=True, return_tensors="pt")
    assert encoded.inputs["input_ids"].tolist() == theirs["input_ids"].tolist()
    prompt = encoder.prompt(messages[:1], data)["input_ids"][0]
    assert encoded.inputs["input_ids"][0, : len(prompt)].tolist() == prompt.tolist()
    for ids in (prompt, encoder.filler().inputs["input_ids"][0]):
        assert (ids == bos).nonzero().tolist() == [[0]]
    assert response_text(encoder, encoded) == "a red star<|im_end|>"


def test_a_bos_token_that_the_template_leaves_to_the_tokenizer_is_added(doubling):
    doubling.chat_template = doubling.chat_template.removeprefix("{{ bos_token }}")
    encoder, bos = ChatEncoder(doubling, 512), doubling.tokenizer.bos_token_id
    ids = encoder.prompt([turn("user", "what?")], [])["input_ids"][0]
    assert (ids == bos).nonzero().tolist() == [[0]] and encoder.template.fingerprint_of_bos() == {}


def test_what_was_made_of_chats_with_two_bos_tokens_has_another_identity(doubling, encoder):
    assert ChatEncoder(doubling, 512).template.fingerprint_of_bos("mine") == {"mine": "one (earlier versions: two)"}
    assert encoder.template.fingerprint_of_bos() == {}, "all others keep their caches"


def test_no_processor(tmp_path):
    with pytest.raises(RecipeError, match="no processor could be built from"):
        load_processor(tmp_path)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_what_to_install(tiny_models, tmp_path):
    """Mistral 3's: transformers has no form of it without."""
    shutil.copytree(tiny_models["llava", "student"], tmp_path, dirs_exist_ok=True)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    with pytest.raises(RecipeError, match="no processor could be built .*: pip install torchvision") as refused:
        load_processor(tmp_path)
    assert "\n" not in str(refused.value).strip()
