"""What Prometheus reads of a running job, through Ray's metrics agent on each node.

Ray prefixes the names with ``ray_``; k8s/components/monitoring scrapes and draws them.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

_COUNTED = {
    "rows_in": ("qbatch_rows", "Rows of the input that were read."),
    "queries": ("qbatch_queries", "Queries whose candidates were read."),
    "passages": ("qbatch_passages", "Passages with a vector."),
    "pairs": ("qbatch_pairs", "Pairs of a query and a document that were scored."),
    "tokens": ("qbatch_tokens", "Tokens of texts, without padding."),
    "tokens_saved": ("qbatch_tokens_saved", "Tokens not computed, as texts begin with the same."),
}
"""From a unit's counts to the name and the meaning of a counter."""


class UnitMetrics:
    """Counts finished units and what was in them, for one job, and tells how many are waiting."""

    def __init__(self, job: str, num_units: int) -> None:
        """Register the metrics.

        Args:
            job: Value of their tag of that name.
            num_units: Units that are to be made.
        """
        self._tags = {"job": job}
        self._waiting = Gauge(
            "qbatch_units_waiting", description="Units not finished yet.", tag_keys=("job",)
        )
        self._num_waiting = num_units
        self._waiting.set(num_units, self._tags)
        self._units = _counter("qbatch_units", "Units that were finished.")
        self._packs = _counter("qbatch_packs", "Forward passes, or requests to a server.")
        self._counted = {name: _counter(*what) for name, what in _COUNTED.items()}
        self._rejected = _counter("qbatch_rejected", "Rows that were rejected.", "reason")
        self._seconds = _counter("qbatch_stage_seconds", "Seconds of all processes.", "stage")

    def add(self, stats: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Take in one finished unit."""
        _add(self._units, 1, self._tags)
        _add(self._packs, stats.get("packs", 0), self._tags)
        self._num_waiting -= 1
        self._waiting.set(self._num_waiting, self._tags)
        for name, counter in self._counted.items():
            _add(counter, counts.get(name, 0), self._tags)
        for reason, number in counts.get("rejected", {}).items():
            _add(self._rejected, number, self._tags | {"reason": reason})
        for stage, seconds in stats["seconds"].items():
            _add(self._seconds, seconds, self._tags | {"stage": stage})


def _counter(name: str, meaning: str, *further_tags: str) -> Counter:
    return Counter(name, description=meaning, tag_keys=("job", *further_tags))


def _add(counter: Counter, number: float, tags: dict[str, str]) -> None:
    if number > 0:  # Ray refuses to add nothing
        counter.inc(number, tags)
