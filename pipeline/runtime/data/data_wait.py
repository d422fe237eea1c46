"""Say when it is the data that a step waits for."""

from __future__ import annotations

from collections import deque

WINDOW = 20
"""Updates over which the share is taken: a single slow read says nothing."""
NOTICEABLE = 0.08
"""Share of the time from which it is said."""
WORSE = 1.5
"""It is said again when the share has grown by so much."""
STARTING = 2
"""Updates that are not counted: the loader's workers start during them."""
KEEP = "data.memory_mb: keeps samples ready for later epochs; "


class DataWaitNotice:
    """Watches a step's updates."""

    def __init__(self, name: str, updates: str = "updates", epochs: bool = True):
        """updates: what the step calls them. epochs: whether it may read a sample again."""
        self._name, self._said, self._what, self._epochs = name, 0.0, updates, epochs
        self._updates: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._skip = STARTING

    def after_update(self, waited: float, took: float, workers: int) -> str | None:
        """Count an update that took so many seconds, of which it waited for data for so many.

        Returns what is to be said: the share and what helps; None most of the time. workers: of a rank's loader.
        """
        if self._skip:
            self._skip -= 1
            return None
        self._updates.append((waited, took))
        share = sum(waited for waited, _ in self._updates) / max(1e-9, sum(took for _, took in self._updates))
        if len(self._updates) < WINDOW or share < max(NOTICEABLE, WORSE * self._said):
            return None
        self._said = share
        return (
            f"{self._name}: {share:.0%} of the time of the last {WINDOW} {self._what} was spent on waiting for "
            f"data. data.workers: more loader processes (now {workers} a rank), where there are cores for them; "
            f"{KEEP if self._epochs else ''}data.max_pixels: smaller images, for both models"
        )
