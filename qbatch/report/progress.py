"""What a running embed job tells: a line every few seconds, and the figures of its summary."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qbatch.report.throughput import Throughput

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0
_STAGES = ("read", "tokenize", "forward", "write", "idle")


class EmbedProgress:
    """Adds up finished units. Seconds are summed over processes and may exceed the wall clock."""

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units
        self._num_done = 0
        self._started = self._last_line = time.monotonic()
        self._totals: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._throughput = Throughput()

    def add(self, stats: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Take in one finished unit; log a line when the last one is old enough."""
        self._num_done += 1
        self._seconds.update(stats["seconds"])
        self._totals.update({name: stats[name] for name in ("tokens_packed", "pack_room")})
        names = ("passages", "passages_reused", "tokens")
        self._totals.update({name: counts[name] for name in names})
        self._totals["rejected"] += sum(counts["rejected"].values())
        now = time.monotonic()
        self._throughput.add(
            now - self._started,
            stats["seconds"]["forward"],
            tokens=stats["tokens_packed"],
            room=stats["pack_room"],
        )
        if now - self._last_line >= _INTERVAL_S or self._num_done == self._num_units:
            self._last_line = now
            self._log(max(now - self._started, 1e-9))

    @property
    def num_embedded(self) -> int:
        """Passages whose vectors were computed; the others of the finished units were copied."""
        return self._totals["passages"] - self._totals["passages_reused"]

    def _log(self, elapsed_s: float) -> None:
        left_s = elapsed_s / self._num_done * (self._num_units - self._num_done)
        log.info(
            "%d/%d units, %s passages, %s rejected, %s tokens/s, about %d s left",
            self._num_done,
            self._num_units,
            f"{self._totals['passages']:,}",
            f"{self._totals['rejected']:,}",
            f"{self._totals['tokens'] / elapsed_s:,.0f}",
            left_s,
        )

    def summary(self, *, total_s: float) -> dict[str, Any]:
        """Return ``pack_fill`` (None when nothing ran) and ``seconds`` by stage."""
        room = self._totals["pack_room"]
        seconds = {stage: round(self._seconds[stage], 3) for stage in _STAGES}
        return {
            "pack_fill": round(self._totals["tokens_packed"] / room, 4) if room else None,
            "seconds": {**seconds, "total": round(total_s, 3)},
        }

    def compute(self, flops_per_token: int, hourly_price: float | None) -> dict[str, Any]:
        """Return what the actors did, reached and cost; None where nothing ran.

        Args:
            flops_per_token: Of a forward pass.
            hourly_price: Of one actor's GPU, or of its machine.
        """
        forward_s, tokens = self._seconds["forward"], self._totals["tokens_packed"]
        if not forward_s:
            return {"actor_hours": 0.0, "tokens_per_s_of_an_actor": None, "teraflops": None}
        hours = (forward_s + self._seconds["idle"]) / 3600
        found = {
            "actor_hours": round(hours, 4),
            "tokens_per_s_of_an_actor": round(tokens / forward_s, 1),
            "teraflops": round(tokens * flops_per_token / forward_s / 1e12, 4),
        }
        if hourly_price is None:
            return found
        cost = hours * hourly_price
        per_million = cost / self.num_embedded * 1e6 if self.num_embedded else None
        return {**found, "cost": round(cost, 4), "cost_per_million_passages": per_million}

    def details(self) -> dict[str, Any]:
        """Return ``throughput``: spans of ``span_s`` seconds with their speed and pack fill."""
        filled = zip(self._throughput.sums("tokens"), self._throughput.sums("room"), strict=True)
        return {
            "throughput": {
                "span_s": self._throughput.span_s,
                "tokens_per_s": self._throughput.rates("tokens"),
                "pack_fill": [round(tokens / room, 4) if room else 0.0 for tokens, room in filled],
            }
        }
