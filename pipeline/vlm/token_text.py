"""What each token of a tokenizer stands for: the bytes that it adds to a text, or a role.

Bytes, not characters: a byte-level token may hold a part of a character, and two tokenizers may cut one character at
different places. Offsets count characters and cannot tell such cuts apart; some tokenizers also trim blanks off them.

A special token adds nothing to a text. What it stands for begins with SPECIAL, a byte that no UTF-8 text has:

    SPECIAL + "end"         the token that ends an assistant turn: whatever its name, its role is the same in all models
    SPECIAL + "eos"         the tokenizer's end of text, where that is another token
    SPECIAL + "token" name  any other: the same where the names are
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.errors import RecipeError
from pipeline.vlm.processing import ChatEncoder

SPECIAL = b"\xff"
END, EOS, NAMED = SPECIAL + b"end", SPECIAL + b"eos", SPECIAL + b"token "
PROBE = "Aé 漢字🙂 the end.\n"
"""Text with characters of one to four bytes: what its tokens stand for has to be the text itself."""

BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>\Z")
"""Name of a token that stands for one byte of a character without a token."""


def token_texts(encoder: ChatEncoder) -> dict[int, bytes]:
    """{id: what it stands for} of every token. `encoder`: the model's, whose template says what ends a turn.

    Raises RecipeError where the tokenizer's decoder is not known here, or its tokens do not make up a text again.
    """
    tokenizer = encoder.processor.tokenizer
    to_bytes = _to_bytes(tokenizer)
    added = {int(index): token for index, token in tokenizer.added_tokens_decoder.items()}
    special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    texts = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            texts[index] = NAMED + token.encode()
        else:
            texts[index] = token.encode() if index in added else to_bytes(token)
    _check(tokenizer, texts)
    if tokenizer.eos_token_id is not None:
        texts[int(tokenizer.eos_token_id)] = EOS
    texts[int(tokenizer.convert_tokens_to_ids(encoder.template.end_of_turn()))] = END
    return texts


def _to_bytes(tokenizer: Any) -> Callable[[str], bytes]:
    """From a token as its vocabulary writes it to its bytes, by the tokenizer's own decoder."""
    parts = list(_decoders(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]))
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        table = {char: byte for byte, char in bytes_to_unicode().items()}
        # As the decoder itself: a token with another character in it stands for its own name.
        return lambda token: bytes(map(table.__getitem__, token)) if table.keys() >= set(token) else token.encode()
    if kinds & {"Metaspace", "ByteFallback"}:
        blank = next((part["replacement"] for part in parts if part["type"] == "Metaspace"), "▁")
        return lambda token: _fallback(token) or token.replace(blank, " ").encode()
    raise RecipeError(
        f"vocabulary: mapped needs a tokenizer that decodes by ByteLevel, Metaspace or ByteFallback, found "
        f"{', '.join(sorted(kinds)) or 'none'} in {tokenizer.name_or_path}; choose another model, or a pair with one "
        "tokenizer and vocabulary: shared"
    )


def _decoders(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if part is not None:
        yield part
        for inner in part.get("decoders", ()):
            yield from _decoders(inner)


def _fallback(token: str) -> bytes | None:
    """The byte of a token such as <0xE2>."""
    match = BYTE_NAME.match(token)
    return bytes([int(match[1], 16)]) if match else None


def _check(tokenizer: Any, texts: Mapping[int, bytes]) -> None:
    """Raise RecipeError unless PROBE's tokens stand for PROBE; a blank may be set before it."""
    found = b"".join(texts[index] for index in tokenizer.encode(PROBE, add_special_tokens=False))
    if found.removeprefix(b" ") != PROBE.encode():
        raise RecipeError(
            f"vocabulary: mapped needs tokens that make up their text: {PROBE!r} came back as {found!r} from the "
            f"tokenizer of {tokenizer.name_or_path}; choose a pair with one tokenizer and vocabulary: shared"
        )
