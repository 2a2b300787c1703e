"""What a running synthesis job tells: a line every few seconds, and the figures of its summary."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0
_STAGES = ("read", "generate")


class SynthesisProgress:
    """Adds up finished units. Seconds are summed over processes and may exceed the wall clock."""

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units
        self._num_done = 0
        self._started = self._last_line = time.monotonic()
        self._num_pairs = 0
        self._seconds: Counter[str] = Counter()

    def add(self, stats: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Take in one finished unit; log a line when the last one is old enough."""
        self._num_done += 1
        self._seconds.update(stats["seconds"])
        self._num_pairs += counts["pairs"]
        now = time.monotonic()
        if now - self._last_line >= _INTERVAL_S or self._num_done == self._num_units:
            self._last_line = now
            elapsed_s = max(now - self._started, 1e-9)
            log.info(
                "%d/%d units, %s pairs, %s pairs/s, about %d s left",
                *(self._num_done, self._num_units, f"{self._num_pairs:,}"),
                f"{self._num_pairs / elapsed_s:,.2f}",
                elapsed_s / self._num_done * (self._num_units - self._num_done),
            )

    def summary(self, *, total_s: float) -> dict[str, Any]:
        """Return ``pairs_per_s`` of this run (None when nothing ran) and ``seconds`` by stage."""
        seconds = {stage: round(self._seconds[stage], 3) for stage in _STAGES}
        return {
            "pairs_per_s": round(self._num_pairs / total_s, 2) if self._num_pairs else None,
            "seconds": {**seconds, "total": round(total_s, 3)},
        }
