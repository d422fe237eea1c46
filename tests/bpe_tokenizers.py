"""Tokenizers of other byte-pair tables than tiny.byte_tokenizer, trained on a few sentences."""

from __future__ import annotations

import json

import transformers as tf
from tiny import SPECIAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ENGLISH = [
    "what is the colour of the ball? the ball is red. it is 1 of 23 balls, and the others are blue or green.",
    "a cat and a dog sit on the mat; the cat is black. abababab abab ab naïve 漢字 🙂🙂",
]
OTHER = [
    "there is nothing that this one and the other have in common but bytes and some words: the, that, there, cat.",
    "abba baba abba 漢字漢字 字漢 naïveté über 🙂🙃 2024 1999 10 100 1000",
]
END = "<|im_end|>"


def bpe_tokenizer(corpus: list[str], size: int, end: str = END) -> tf.PreTrainedTokenizerFast:
    """Byte-level: `size` ids and the special tokens; `end` ends a turn, in the place of <|im_end|>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        corpus * 4, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return _fast(backend, end)


def blanks_tokenizer(corpus: list[str], size: int, end: str = END) -> tf.PreTrainedTokenizerFast:
    """In the manner of SentencePiece: blanks as ▁, and bytes such as <0xE6> for characters without a token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    letters = sorted({char for text in corpus for char in text if char.isascii()} | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False
    )
    trained.train_from_iterator(corpus * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: index for index, token in enumerate([*names, *model["vocab"]])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in model["merges"]], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(backend, end)


def _fast(backend: Tokenizer, end: str) -> tf.PreTrainedTokenizerFast:
    special = [end if token == END else token for token in SPECIAL]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=special[0],
        additional_special_tokens=special,
        model_max_length=4096,
    )
