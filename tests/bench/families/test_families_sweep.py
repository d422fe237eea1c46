"""The sweep over transformers' families: what it verifies, what it refuses, and what it writes."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_families import BROKEN
from transformers import AutoModelForImageTextToText

from bench.families.__main__ import page, try_family
from bench.families.inputs import probe_rows
from bench.families.shrink import shrunk_config
from pipeline.errors import RecipeError
from pipeline.vlm.parts import logit_rule
from pipeline.vlm.probe import check_on, probe_batch


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("cohere2_vision", ""),  # its config's logit_scale is applied to nothing
        ("hyperclovax_vision_v2", ""),
        ("lfm2_vl", "its norm is `embedding_norm`"),
        ("mistral3", ""),
        ("muse_glimmer", "scales its logits by 0.1961; caps its logits at 20"),
        ("paligemma", ""),
        ("video_llava", "`model.video_tower` never trains"),
    ],
)
def test_verified_with_what_it_needed(kind, needed):
    tried = try_family(kind)
    assert (tried.outcome, tried.note) == ("verified", needed)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("blip", "beside text_decoder.bert.encoder.layer there is no norm"),
        ("hy_v4_vl", "layer 4 gives [12, 4, 64], the head takes [12, 64]"),
        ("udop", "has an encoder and a decoder for text"),
        ("mistral4", "no module outside the decoder that an image could go through"),
    ],
)
def test_refused_with_the_reason(kind, why):
    tried = try_family(kind)
    assert tried.outcome == "refused" and why in tried.note


@pytest.mark.skipif(not transformers.__version__.startswith(BROKEN["llama4"]), reason="this version can")
def test_a_family_that_this_transformers_cannot_run_is_refused_with_its_fault():
    tried = try_family("llama4")
    assert tried.outcome == "refused"
    assert f"transformers {transformers.__version__} cannot run model_type 'llama4'" in tried.note
    assert "AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'" in tried.note


def test_a_prefix_that_sees_all_of_itself_must_end_before_the_response():
    """PaliGemma's token type 0 is the prefix, whose tokens see one another; with it everywhere, so do responses."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shrunk_config("paligemma")).eval()
    image, text = probe_rows(model)
    check_on(model, probe_batch(image, text), (1, 2))
    for row in (image, text):
        row.inputs["token_type_ids"].zero_()
    with pytest.raises(RecipeError, match="sees the response that it is to predict"):
        check_on(model, probe_batch(image, text), (1, 2))


def test_the_rule_found_gives_the_models_logits():
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shrunk_config("muse_glimmer")).eval()
    image, text = probe_rows(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)  # far into the cap
    check_on(model, probe_batch(image, text), (1, 2))
    rule, config = logit_rule(model), model.config.get_text_config()
    assert rule.softcap == config.final_logit_softcapping
    assert rule.scale == pytest.approx(config.output_multiplier)


def test_the_page_counts_and_gives_each_a_row():
    tried = [try_family("llava"), try_family("udop")]
    text = page(tried)
    assert "**1 of 2** image-text-to-text families" in text
    assert "| llava | verified |  |" in text and "| udop | refused | model_type 'udop' has an encoder" in text
