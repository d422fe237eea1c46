"""Split samples into train and held out by a hash of their pictures, so that no picture is in both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence


def split_of(pictures: Sequence[Sequence[bytes]], held_out: float) -> list[str]:
    """Say "train" or "held_out" for samples that hold the given pictures (digests of them; one at least each).

    A sample of one picture goes where a hash of that picture says. Samples that share pictures, directly or through
    others, form a group that stays together: it goes where the smallest digest of the group says.
    """
    smallest = _groups(pictures)
    return ["held_out" if _place(smallest(sample[0])) < held_out else "train" for sample in pictures]


def _groups(pictures: Sequence[Sequence[bytes]]) -> Callable[[bytes], bytes]:
    """Union-find over pictures, each group represented by its smallest member; returns the function that finds it."""
    parent: dict[bytes, bytes] = {}

    def find(picture: bytes) -> bytes:
        root = picture
        while (above := parent.get(root, root)) != root:
            root = above
        while picture != root:  # shorten the way for the next who asks
            parent[picture], picture = root, parent.get(picture, picture)
        return root

    for sample in pictures:
        for picture in sample[1:]:
            one, other = sorted((find(sample[0]), find(picture)))
            if one != other:
                parent[other] = one
    return find


def _place(picture: bytes) -> float:
    """A number from 0 to 1 that looks random and is the picture's for good."""
    return int.from_bytes(hashlib.sha256(b"split" + picture).digest()[:8], "big") / 2**64
