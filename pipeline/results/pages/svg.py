"""A matplotlib figure as a part of a page: its text stays text, in the page's own colour, light or dark."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour in a figure."""
WIDTH = 4.2
"""Inches of a figure: as wide as a phone's screen, where its text is then as large as on a desk."""
BLUE = "#3b82c4"
"""Legible on light and dark."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
"""matplotlib's settings for figures of pages."""


@dataclass(frozen=True)
class Views:
    """A figure, and the same on a log scale, where that makes sense."""

    linear: Markup
    log: Markup | None = None


def page_style() -> AbstractContextManager[None]:
    """A figure that is made inside looks as the page does."""
    return matplotlib.rc_context(SETTINGS)


def inline(figure: Figure, label: str) -> Markup:
    """The figure as an element. label: what it shows, for those who cannot see it."""
    written = io.StringIO()
    # The salt makes ids: one that another figure shares would be lost where that one is hidden.
    with page_style(), matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))  # matplotlib escapes
