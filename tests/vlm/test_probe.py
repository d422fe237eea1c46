"""A model's parts are found by structure and checked on a probe: families that stand in no table, and wrong parts."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from tiny import CHAT, chats
from tiny_families import FAMILIES, _tokenizer, as_parameter, write_family

from pipeline.errors import RecipeError
from pipeline.recipe.schema import ModelParts
from pipeline.steps.reinforce import Finetuned
from pipeline.vlm.backbone import load_vlm, run_backbone
from pipeline.vlm.parts import LogitRule, image_parts, logit_rule, may_be_unused, parts_of, recognise, set_trainable
from pipeline.vlm.probe import check_on, check_parts, probe, probe_batch
from pipeline.vlm.processing import ChatEncoder, collate, load_processor

TARGETS = (1, 2)


@pytest.fixture(scope="module", params=map(as_parameter, FAMILIES))
def loaded(request, tmp_path_factory):
    folder = write_family(tmp_path_factory.mktemp(request.param), request.param, 3)
    encoder = ChatEncoder(load_processor(folder), 512)
    encoder.check()
    return folder, load_vlm(folder, torch.float32), encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_stands_in_no_table_is_verified(loaded, dtype):
    folder, _, encoder = loaded
    model = load_vlm(folder, dtype)
    check_parts(model, encoder, TARGETS, "cpu", dtype)
    assert parts_of(model).vision and parts_of(model).projectors


def test_a_step_moves_all_that_trains_and_nothing_else(loaded):
    """One update of reinforce's module on chats with images and one without, in one process."""
    folder, _, encoder = loaded
    model = load_vlm(folder, torch.float32)
    set_trainable(model, ("decoder", "projector", "head"))
    module = Finetuned(model, len(encoder.processor.tokenizer)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    batch = _batch(encoder, 5)
    loss = module(batch).sum() / len(batch.labels)
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved <= trained
    assert {name for name in trained - moved if not name.endswith(may_be_unused(model) or ("none",))} == set()
    assert any(name.startswith(image_parts(model)) for name in moved)


def test_a_chat_gives_the_same_alone_and_beside_others(loaded):
    """Token types, masks and the filler row change nothing of a chat without an image."""
    _, model, encoder = loaded
    model.eval()
    key, record, _ = chats(5)[4]
    alone = collate([encoder(key, record["messages"], [])], encoder.filler(), 0)
    together = _batch(encoder, 5)
    with torch.no_grad():
        (one,) = run_backbone(model, alone.inputs, [3], alone.positions)
        (many,) = run_backbone(model, together.inputs, [3], together.positions)
    torch.testing.assert_close(many[-len(one) :], one)


def test_the_rule_for_logits_is_the_models_and_not_its_configs(tmp_path):
    """Gemma 3's config has a soft-cap, which the model of images and text applies to nothing in some versions."""
    model, encoder = _of("gemma3", tmp_path)
    assert logit_rule(model) == LogitRule(1.0, 1.0), "before the probe, what the config says"
    check_parts(model, encoder, TARGETS, "cpu", torch.float32)
    batch = _batch(encoder, 3)
    with torch.no_grad():
        theirs = model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
        (last,) = run_backbone(model, batch.inputs, [3], batch.positions)
        module = Finetuned(model, theirs.shape[1], loss=lambda hidden, head, labels: head.logits(hidden)[0])
        ours = module(batch)
    torch.testing.assert_close(ours, theirs)
    assert last.shape == (len(batch.labels), 32)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"norm": "model.language_model.layers.0.input_layernorm"}, "norm of .* is not the head's input, by .* times"),
        ({"decoder": "model.vision_tower"}, "decoder of .* holds no list of its 3 decoder layers"),
        (
            {"head": "model.language_model.layers.0.mlp.up_proj"},
            "expected a linear layer from 32 to 268 or more, found Linear from 32 to 64",
        ),
        ({"vision": ["model.nowhere"]}, "vision of .* the recipe names model.nowhere, and .* no such module"),
        ({"projector": ["model.language_model.embed_tokens", "lm_head.none"]}, "projector of .* names lm_head.none"),
    ],
)
def test_a_wrong_part_is_refused_with_its_field(tmp_path, named, said):
    folder = write_family(tmp_path, "internvl", 3)
    encoder = ChatEncoder(load_processor(folder), 512)
    with pytest.raises(RecipeError, match=said) as refused:
        check_parts(load_vlm(folder, torch.float32, parts=ModelParts(**named)), encoder, TARGETS, "cpu", torch.float32)
    assert "teacher.parts or student.parts: {" in str(refused.value)


def test_parts_that_the_recipe_names_are_taken_where_they_are_right(tmp_path):
    folder = write_family(tmp_path, "internvl", 3)
    named = ModelParts(
        decoder="model.language_model",
        norm="model.language_model.norm",
        head="lm_head",
        vision=("model.vision_tower",),
        projector=("model.multi_modal_projector",),
    )
    model = load_vlm(folder, torch.float32, parts=named)
    assert parts_of(model) == recognise(load_vlm(folder, torch.float32))


def test_a_norm_that_only_looks_like_the_final_one_is_refused(tmp_path):
    """Structure alone would take it: it stands beside the layers, under a name that other families have."""
    model, encoder = _of("internvl", tmp_path)
    decoder = model.model.language_model
    decoder.norm, decoder.final_norm = torch.nn.Identity(), decoder.norm
    assert recognise(model).norm == "model.language_model.final_norm"
    with pytest.raises(RecipeError, match=r"the last layer's state through .*final_norm is not the head's input"):
        check_parts(model, encoder, TARGETS, "cpu", torch.float32)


def test_attention_that_sees_the_response_is_refused(tmp_path):
    """Gemma 3 lets positions of token type 1 see one another: were a response marked so, it would see its own words."""
    model, encoder = _of("gemma3", tmp_path)
    image, text = _probe_rows(encoder)
    image.inputs["token_type_ids"] = image.response[None].long()
    with pytest.raises(RecipeError, match="sees the response that it is to predict"):
        check_on(model, probe_batch(image, text), TARGETS)


def test_a_processor_that_takes_no_chat_of_text_is_refused(tmp_path):
    """PaliGemma's; it also puts a token behind the images, after the template, so that no span of the text is right."""
    tokenizer = _tokenizer(image_token="<image>")
    tokenizer.bos_token = "<|im_start|>"
    images = tf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    template = CHAT.replace("IMAGE", "<image>")
    encoder = ChatEncoder(tf.PaliGemmaProcessor(images, tokenizer, chat_template=template), 512)
    with pytest.raises(RecipeError, match="must take chats with an image and chats without.* are expected"):
        probe(encoder)


def test_values_that_are_not_finite_are_refused(tmp_path):
    model, encoder = _of("internvl", tmp_path)
    torch.nn.init.constant_(model.model.language_model.layers[1].mlp.down_proj.weight, math.inf)
    with pytest.raises(RecipeError, match="values that are not finite"):
        check_parts(model, encoder, TARGETS, "cpu", torch.float32)


def test_a_probe_leaves_no_hooks_and_the_models_mode(tmp_path):
    model, encoder = _of("internvl", tmp_path)
    model.train()
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    check_parts(model, encoder, TARGETS, "cpu", torch.float32)
    ours = [hook for part in model.modules() for hook in part._forward_hooks.values() if "pipeline" in hook.__module__]
    assert model.training and not ours and not model.lm_head._forward_pre_hooks
    assert hooks == 0


def _of(kind, folder):
    write_family(folder, kind, 3)
    return load_vlm(folder, torch.float32), ChatEncoder(load_processor(folder), 512)


def _batch(encoder, count):
    return collate([encoder(k, r["messages"], i) for k, r, i in chats(count)], encoder.filler(), 0)


def _probe_rows(encoder):
    (key, image, data), (other, text, _) = chats(5)[0], chats(5)[4]
    return encoder(key, image["messages"], data), encoder(other, text["messages"], [])
