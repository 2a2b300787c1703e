"""What a running rerank job tells: a line every few seconds, and the figures of its summary."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qbatch.report.throughput import Throughput

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0
_STAGES = ("read", "tokenize", "forward", "write", "idle")


class RerankProgress:
    """Adds up finished units. Seconds are summed over processes and may exceed the wall clock."""

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units
        self._num_done = 0
        self._started = self._last_line = time.monotonic()
        self._num_pairs = 0
        self._seconds: Counter[str] = Counter()
        self._throughput = Throughput()

    def add(self, stats: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Take in one finished unit; log a line when the last one is old enough."""
        self._num_done += 1
        self._seconds.update(stats["seconds"])
        self._num_pairs += counts["pairs"]
        now = time.monotonic()
        self._throughput.add(
            now - self._started, stats["seconds"]["forward"], pairs=counts["pairs"]
        )
        if now - self._last_line >= _INTERVAL_S or self._num_done == self._num_units:
            self._last_line = now
            elapsed_s = max(now - self._started, 1e-9)
            log.info(
                "%d/%d units, %s pairs, %s pairs/s, about %d s left",
                *(self._num_done, self._num_units, f"{self._num_pairs:,}"),
                f"{self._num_pairs / elapsed_s:,.1f}",
                elapsed_s / self._num_done * (self._num_units - self._num_done),
            )

    def summary(self, *, join_s: float, total_s: float) -> dict[str, Any]:
        """Return ``pairs_per_s`` of this run (None when nothing ran) and ``seconds`` by stage."""
        elapsed_s = total_s - join_s
        seconds = {stage: round(self._seconds[stage], 3) for stage in _STAGES}
        return {
            "pairs_per_s": round(self._num_pairs / elapsed_s, 1) if self._num_pairs else None,
            "seconds": {"join": round(join_s, 3), **seconds, "total": round(total_s, 3)},
        }

    def details(self) -> dict[str, Any]:
        """Return ``throughput``: spans of ``span_s`` seconds with the pairs a second of each."""
        pairs_per_s = self._throughput.rates("pairs")
        return {"throughput": {"span_s": self._throughput.span_s, "pairs_per_s": pairs_per_s}}
