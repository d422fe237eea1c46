"""Limits on how large an image a model sees, in pixels, whatever the model's family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class PixelLimits:
    """Smallest and largest area of an image in pixels; None leaves it to the model's processor."""

    smallest: int | None = None
    largest: int | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """The image; scaled, with its shape kept, where its area lies outside the limits."""
        area = image.width * image.height
        if self.largest is not None and area > self.largest:
            return _scaled(image, self.largest / area, math.floor)
        if self.smallest is not None and area < self.smallest:
            return _scaled(image, self.smallest / area, math.ceil)
        return image

    def set_on(self, processor: Any) -> bool:
        """Set the limits on a processor that scales by area itself, as Qwen2-VL's does; returns whether it is one.

        Its own scaling also rounds to whole patches: scaling twice would blur, and differ from what a user of the
        exported model gets for the same limits.
        """
        images = processor.image_processor
        own = dict(getattr(images, "size", None) or {})
        if not hasattr(images, "merge_size") or not {"shortest_edge", "longest_edge"} <= set(own):
            return False
        size = {
            "shortest_edge": self.smallest or own["shortest_edge"],
            "longest_edge": self.largest or own["longest_edge"],
        }
        images.size = type(images.size)(**size)
        return True


def _scaled(image: Image.Image, area: float, whole: Callable[[float], int]) -> Image.Image:
    width, height = (max(1, whole(round(side * math.sqrt(area), 6))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


NO_LIMITS = PixelLimits()
