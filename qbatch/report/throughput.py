"""How fast a job went over time, in few numbers however long it ran."""

from collections import Counter

_FIRST_SPAN_S = 10.0
_MAX_SPANS = 60
"""A page shows no more; spans get longer with the job."""


class Throughput:
    """Sums of amounts in spans of equal length, counted from the start of a job."""

    def __init__(self) -> None:
        self._span_s = _FIRST_SPAN_S
        self._end_s = 0.0
        self._sums: list[Counter[str]] = []

    def add(self, end_s: float, lasted_s: float, **amounts: float) -> None:
        """Spread what a unit of work brought over the time that it took.

        Args:
            end_s: When it was done, in seconds since the start of the job.
            lasted_s: How long it took; what would begin before the job is cut there.
            amounts: By name.
        """
        start_s = max(0.0, end_s - lasted_s)
        self._end_s = max(self._end_s, end_s)
        while self._end_s >= self._span_s * _MAX_SPANS:
            self._widen()
        first, last = int(start_s // self._span_s), int(end_s // self._span_s)
        self._sums += [Counter() for _ in range(last + 1 - len(self._sums))]
        for i in range(first, last + 1):
            inside_s = min(end_s, (i + 1) * self._span_s) - max(start_s, i * self._span_s)
            share = inside_s / (end_s - start_s) if end_s > start_s else 1.0
            self._sums[i].update({name: value * share for name, value in amounts.items()})

    def _widen(self) -> None:
        """Double the length of the spans."""
        self._span_s *= 2
        pairs = zip(self._sums[::2], [*self._sums[1::2], Counter()], strict=False)
        self._sums = [Counter(even) + Counter(odd) for even, odd in pairs]

    @property
    def span_s(self) -> float:
        """Seconds of a span; the last one may be shorter."""
        return self._span_s

    def sums(self, name: str) -> list[float]:
        """Return an amount by span."""
        return [round(sums[name], 3) for sums in self._sums]

    def rates(self, name: str) -> list[float]:
        """Return an amount a second by span."""
        lengths = [
            min(self._span_s, self._end_s - i * self._span_s) for i in range(len(self._sums))
        ]
        return [
            round(value / length, 1) if length > 0 else 0.0
            for value, length in zip(self.sums(name), lengths, strict=True)
        ]
