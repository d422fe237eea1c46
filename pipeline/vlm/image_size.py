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

    def area(self, width: int, height: int) -> float:
        """Pixels that an image of this size has once it is scaled."""
        area = float(width * height)
        area = area if self.smallest is None else max(area, self.smallest)
        return area if self.largest is None else min(area, self.largest)

    @classmethod
    def of(cls, processor: Any) -> PixelLimits | None:
        """The limits of a processor that scales by area itself, as Qwen2-VL's does; None of another."""
        images = processor.image_processor
        own = dict(getattr(images, "size", None) or {})
        if not hasattr(images, "merge_size") or not {"shortest_edge", "longest_edge"} <= set(own):
            return None
        return cls(own["shortest_edge"], own["longest_edge"])

    def set_on(self, processor: Any) -> bool:
        """Set the limits on a processor that scales by area itself; returns whether it is one.

        Its own scaling also rounds to whole patches: scaling twice would blur, and differ from what a user of the
        exported model gets for the same limits.
        """
        own = PixelLimits.of(processor)
        if own is None:
            return False
        size = {"shortest_edge": self.smallest or own.smallest, "longest_edge": self.largest or own.largest}
        images = processor.image_processor
        images.size = type(images.size)(**size)
        return True


def _scaled(image: Image.Image, area: float, whole: Callable[[float], int]) -> Image.Image:
    width, height = (max(1, whole(round(side * math.sqrt(area), 6))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


NO_LIMITS = PixelLimits()
