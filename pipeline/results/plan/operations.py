"""Floating-point operations of each step for one mean sample, in matrix products and attention.

A product of [n, a] and [a, b] is 2 n a b operations. A backward takes two more products of each forward: one for the
input's gradient, one for the weight's. Attention counts in full, as torch's counter does, though kernels skip half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.recipe.schema import Recipe, StudentTraining
from pipeline.results.plan.models import PlannedModel, Vision, vision_of
from pipeline.results.plan.samples import Samples
from pipeline.results.plan.signals import candidates
from pipeline.vlm.parts import text_config


@dataclass(frozen=True)
class Sample:
    """The mean sample whose operations are counted, in tokens."""

    tokens: float
    response: float
    image: float
    images: float = 1.0
    """Images that the image tokens belong to."""


def mean_sample(samples: Samples) -> Sample:
    """The mean over the data."""
    return Sample(samples.tokens, samples.response, samples.image, samples.images)


def backbone_forward(model: PlannedModel, sample: Sample) -> float:
    """One forward of the image encoder and the decoder layers, without the head."""
    return (
        vision_forward(vision_of(model), sample)
        + sample.tokens * 2 * model.decoder_elements()
        + attention(model, sample)
    )


def attention(model: PlannedModel, sample: Sample) -> float:
    """Scores and weighted sums of all decoder layers: two products of [tokens, tokens] and the heads' width."""
    config = text_config(model.module)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4 * sample.tokens**2 * heads * head_width * model.depth


def head_product(model: PlannedModel, vocab: int, tokens: float) -> float:
    """The language head on so many states."""
    return 2 * tokens * vocab * model.width


def verb_ffn_forward(model: PlannedModel, sample: Sample) -> float:
    """The verb-FFNs of all target layers on a sample's response tokens."""
    return 2 * sample.response * 3 * model.width**2 * len(model.layers)


def verbalize_operations(sides: list[PlannedModel], vocab: int, sample: Sample) -> float:
    """Frozen forwards; verb-FFNs with their backward; the head, and the gradient at its input for the target layers.

    The input of a verb-FFN needs no gradient, but autograd takes two products for each of its weights' three, less the
    two whose input is the frozen state.
    """
    total = 0.0
    for side in sides:
        head = head_product(side, vocab, sample.response)
        blocks = verb_ffn_forward(side, sample)
        total += backbone_forward(side, sample) + len(side.layers) * 2 * head + head + blocks * (1 + 1 + 1)
    return total


def cache_operations(teacher: PlannedModel, recipe: Recipe, vocab: int, sample: Sample) -> float:
    """One forward of the teacher, with verb-FFNs and the head for each cached layer: twice to measure a bucket too."""
    heads = (len(teacher.layers) + 1) * head_product(teacher, vocab, sample.response)
    heads *= 1 if recipe.vocabulary == "shared" else 2
    return backbone_forward(teacher, sample) + verb_ffn_forward(teacher, sample) + heads


def interact_operations(
    student: PlannedModel, teacher: PlannedModel, cached_layers: int, recipe: Recipe, vocab: int, sample: Sample
) -> float:
    """The student's forward and backward, frozen verb-FFNs, and one head product and its gradient a target layer.

    cached_layers: J, without the last one.
    """
    training, kept = recipe.interact, sample.response * recipe.interact.token_share
    used = replace(sample, response=kept)
    head = head_product(student, vocab, kept)
    blocks = verb_ffn_forward(student, used) * (3 if training.train_verbalizers else 2)
    supervision = 2 * head * len(student.layers) if training.deep_supervision_weight else 0
    last = head * (3 if recipe.trains(training, "head") else 2) * (2 if training.cross_entropy_weight else 1)
    return (
        _trained_backbone(student, recipe, training, used)
        + blocks
        + supervision
        + last
        + _search(student, teacher, cached_layers, recipe, vocab, kept)
    )


def _search(
    student: PlannedModel, teacher: PlannedModel, cached_layers: int, recipe: Recipe, vocab: int, tokens: float
) -> float:
    """Head products of the target layers' losses and, from cached states, of the teacher's too.

    The bucket of a mapped vocabulary takes the student's again. From states, the teacher's logits are computed for all
    candidates, then for each match and the last layer, and the student's for the candidates and for the match.
    """
    layers, head = len(student.layers), head_product(student, vocab, tokens)
    if recipe.cache.codec.name == "hidden":
        searched = len(candidates(recipe, layers, cached_layers))
        return 3 * head * layers + head_product(teacher, vocab, tokens) * (searched + layers + 1)
    return (2 if recipe.vocabulary == "shared" else 4) * head * layers


def reinforce_operations(student: PlannedModel, recipe: Recipe, sample: Sample) -> float:
    """The student's forward and backward, and the head once."""
    training = recipe.reinforce
    head = head_product(student, student.rows, sample.response) * (3 if recipe.trains(training, "head") else 2)
    return _trained_backbone(student, recipe, training, sample) + head


def _trained_backbone(student: PlannedModel, recipe: Recipe, training: StudentTraining, sample: Sample) -> float:
    """Forward, backward and, with gradient checkpointing, the decoder's forward again."""
    vision = vision_of(student)
    decoder = sample.tokens * 2 * student.decoder_elements() + attention(student, sample)
    again = decoder if recipe.gradient_checkpointing else 0.0
    if again and not training.lora_rank:
        again -= _last_products(student, sample)
    weights = sample.tokens * 2 * student.decoder_elements(trained=True)
    inputs = sample.tokens * 2 * student.decoder_elements() + 2.5 * attention(student, sample)
    tower = vision_forward(vision, sample)
    if recipe.trains(training, "vision"):
        tower *= 3
    elif recipe.trains(training, "projector"):
        tower += 4 * sample.image * vision.projector_elements
    return tower + decoder + again + inputs + weights


def _last_products(student: PlannedModel, sample: Sample) -> float:
    """A layer's last product is not run again, where no adapter follows: the backward needs nothing that it gives.

    But the experts' is: the gradient of a token's weights for them needs what they give.
    """
    if not (dense := student.dense_layers):
        return 0.0
    return sample.tokens * 2 * student.width * text_config(student.module).intermediate_size * dense


def vision_forward(vision: Vision, sample: Sample) -> float:
    """One forward of the image encoder. Attention is within an image, or a tile or window of it."""
    patches = sample.image * vision.patches_per_token
    products = 2 * patches * vision.elements + 2 * sample.image * vision.projector_elements
    of_one = patches / sample.images if sample.images else 0.0
    return products + 4 * patches * vision.width * sum(min(of_one, span) for span in vision.spans)
