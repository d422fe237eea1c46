"""The parts of the cache benchmark, on random hidden states instead of a language model's."""

import numpy as np
import pytest
import torch

from bench.cache.error import CodecError, batch_divergences, candidate_pairs
from bench.cache.layer_outputs import LayerOutputs, Setting
from bench.cache.peer_codecs import DistillKit, MegatronTopK, published, record_arrays
from bench.cache.size import code
from bench.cache.training import AdaptedLayer, Schedule, constant_signal, train
from pipeline.codec.packing import join_arrays
from pipeline.codec.registry import make_codec
from pipeline.signal import HiddenSignal, Unembedding
from pipeline.vlm.verbalizer import VerbFFN

TOKENS, WIDTH, VOCAB = 64, 16, 400
LAYERS, STUDENT_LAYERS = (2, 5, 8, 11), (2, 8)


@pytest.fixture(scope="module")
def outputs() -> LayerOutputs:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    teacher, weight = random(TOKENS, len(LAYERS) + 1, WIDTH), random(VOCAB, WIDTH)
    return LayerOutputs(
        setting=Setting(teacher_layers=LAYERS, student_layers=STUDENT_LAYERS, follower=2, followed=5),
        teacher=teacher,
        student=random(TOKENS, len(STUDENT_LAYERS) + 1, WIDTH),
        teacher_weight=weight,
        student_weight=weight + 0.1 * random(VOCAB, WIDTH),
        labels=torch.randint(VOCAB, (TOKENS,), generator=generator),
        lengths=torch.tensor([40, 24]),
        order=(teacher.flatten(0, 1) @ weight.T).softmax(1).mean(0).argsort(descending=True),
        train_teacher=teacher[:, 1],
        train_student=random(TOKENS, WIDTH),
        eval_student=random(TOKENS, WIDTH),
        norm_weight=torch.ones(WIDTH),
        teacher_loss=torch.zeros(len(LAYERS) + 1),
        student_loss=torch.zeros(len(STUDENT_LAYERS) + 1),
        follower=VerbFFN(WIDTH).state_dict(),
    )


def error_of(outputs: LayerOutputs, signal) -> dict:
    pairs = candidate_pairs(len(STUDENT_LAYERS), len(LAYERS))
    error = CodecError(pairs)
    for rows in (slice(0, 32), slice(32, 64)):
        true, coded = batch_divergences(outputs, pairs, rows, {"it": signal})
        error.add(true, coded["it"], outputs.student[rows].transpose(0, 1)[[i for i, _ in pairs]])
    return error.summary({"last": range(len(LAYERS), len(LAYERS) + 1)})


@pytest.mark.parametrize("name", published(VOCAB, np.arange(VOCAB)))
def test_what_a_peer_packs_it_unpacks(outputs, name):
    codec = published(VOCAB, outputs.order.numpy())[name]
    arrays = record_arrays(codec.encode(outputs.teacher, outputs.unembedding, torch.zeros(TOKENS, len(LAYERS) + 1)))
    read = codec.unpack(codec.pack(arrays), TOKENS, len(LAYERS) + 1)
    # A sample is not stored in the order in which it was drawn.
    for key in set(arrays) & set(read) - {"ranks", "entropy", "tail"}:
        np.testing.assert_array_equal(read[key], arrays[key])
    signal = codec.decode(join_arrays([read]))
    total = signal.probs.sum(-1) + signal.tail
    if name == "distillkit_k50_bucket":  # a curve may exceed the available probability
        total = total.clamp(max=1.0)
    half = 2.0**-11 * 10  # float16 log-probabilities of up to 10 nats
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=half)


def test_megatron_ids_have_a_seventeenth_bit():
    ids = np.array([[[3, 65535, 65536, 131071]]], np.int32)
    codec = MegatronTopK(4)
    streams = codec.pack({"ids": ids, "logprobs": np.full(ids.shape, -2.0, np.float16)})
    assert (codec.unpack(streams, 1, 1)["ids"] == ids).all()


def test_distillkit_takes_the_bytes_that_it_publishes():
    codec = DistillKit(vocab=65536, k=50, exact=1, terms=(0, 1, "sqrt"))
    hidden, head = torch.randn(1, 1, 4), Unembedding(torch.randn(65536, 4), vocab=65536)
    streams = codec.pack(record_arrays(codec.encode(hidden, head, torch.zeros(1, 1))))
    assert sum(map(len, streams.values())) == 114


def test_distillkit_keeps_a_curve_of_its_own_terms():
    codec = DistillKit(VOCAB, k=20, exact=2, terms=(0, 1, "sqrt"))
    rank = torch.arange(18.0)
    logprobs = -3 - 0.1 * rank - 0.5 * rank.sqrt()
    torch.testing.assert_close(codec.curve(codec.fit(logprobs)), logprobs)


def test_an_exact_codec_has_no_error_and_a_finer_sample_has_less(outputs):
    exact = error_of(outputs, HiddenSignal(outputs.teacher, outputs.unembedding))
    assert exact["kl_rms_nats"] < 1e-6 and exact["draw_tv"] < 1e-6 and exact["grad_cosine_batch"] > 1 - 1e-6
    coarse, fine = (code(outputs, make_codec("sampled", points=n, order=outputs.order.numpy())) for n in (16, 256))
    assert error_of(outputs, fine.signal)["kl_rms_nats"] < error_of(outputs, coarse.signal)["kl_rms_nats"] / 4
    assert coarse.bytes_per_token_layer < fine.bytes_per_token_layer
    assert coarse.fixed_bytes == 4 * VOCAB  # the order


def test_a_sparse_signal_of_all_ids_is_the_dense_one(outputs):
    whole = code(outputs, make_codec("topk", k=VOCAB))
    error = error_of(outputs, whole.signal)
    assert error["grad_relative_error_batch"] < 2e-3  # float16 log-probabilities
    assert abs(error["kl_bias_nats"]) < 2e-3


def test_a_student_learns_from_a_signal(outputs):
    signal = HiddenSignal(outputs.train_teacher[:, None], outputs.unembedding)
    schedule = Schedule(tokens=TOKENS, updates=4)
    start = train(outputs, constant_signal(signal), Schedule(tokens=TOKENS, updates=0), seed=0)
    assert train(outputs, constant_signal(signal), schedule, seed=0) < start
    assert not any(one.requires_grad for one in AdaptedLayer(outputs, 0).verb_ffn.parameters())
