"""How much of the truth an index finds: recall of probes, its uncertainty, and the effort it takes.

recall@k of a probe is the share of its k nearest neighbours among the first k found. A found row
that ties with the k-th neighbour counts, since no order between them is more right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qbatch.errors import QualityGateError
from qbatch.index.neighbours import Neighbours

RECALL_DEPTHS = (1, 10, 100)
TUNED_DEPTH = 10
"""Recall at this depth decides the effort and the gate."""

_TIE = 1e-6
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """A mean over probes and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Recall":
        """Summarise the recall of each probe; without probes nothing was missed."""
        if not len(values):
            return cls(mean=1.0, low=1.0, high=1.0)
        rng = np.random.default_rng(0)
        draws = rng.integers(0, len(values), (_RESAMPLES, len(values)))
        low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
        return cls(mean=float(values.mean()), low=float(low), high=float(high))

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers, rounded, for a manifest."""
        return {
            "mean": round(self.mean, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


def recall_of_probes(found: Neighbours, exact: Neighbours, depth: int) -> np.ndarray:
    """Return the recall of each probe at a depth: float64, (probes,).

    A probe with fewer neighbours than ``depth`` is measured on those it has; one with none is 1.
    """
    available = np.minimum((exact.rows >= 0).sum(axis=1), depth)
    last = exact.scores[np.arange(len(available)), np.maximum(available, 1) - 1]
    relevant = (exact.rows >= 0) & (exact.scores >= last[:, None] - _TIE)
    hits = _count_shared(found.rows[:, :depth], np.where(relevant, exact.rows, -1))
    recall: np.ndarray = np.minimum(hits, available) / np.maximum(available, 1) + (available == 0)
    return recall


def _count_shared(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each line how many rows of ``found`` are in the same line of ``wanted``."""
    shared = np.zeros(len(found), np.int64)
    for column in found.T[:, :, None]:
        shared += ((wanted == column) & (column >= 0)).any(axis=1)
    return shared


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """What one effort finds, and what it takes."""

    effort: int
    found: Neighbours
    seconds: float
    """Of searching the probes in all shards, one after the other."""


def choose_effort(
    curve: Sequence[CurvePoint], exact: Neighbours, target_recall: float
) -> tuple[CurvePoint, np.ndarray]:
    """Return the cheapest point that reaches the target, and which probes confirm it.

    Half of the probes choose it, so that the lower end of their interval is above the target if
    any point gets that far. The other half must agree in the mean, or the next point is taken.

    Args:
        curve: By rising effort.
        exact: The probes' true neighbours.
        target_recall: Of recall@10.

    Returns:
        The point, and a mask of the probes that did not choose it.
    """
    is_tuning = (np.arange(len(exact.rows)) % 2 == 0) & (len(exact.rows) > 1)
    recalls = [recall_of_probes(point.found, exact, TUNED_DEPTH) for point in curve]
    tuned = [Recall.of(values[is_tuning]) for values in recalls]
    reaching = [i for i, recall in enumerate(tuned) if recall.low >= target_recall]
    reaching += [i for i, recall in enumerate(tuned) if recall.mean >= target_recall]
    for i in range(reaching[0] if reaching else len(curve), len(curve)):
        if Recall.of(recalls[i][~is_tuning]).mean >= target_recall:
            return curve[i], ~is_tuning
    return curve[-1], ~is_tuning


def measured_recall(found: Neighbours, exact: Neighbours, probes: np.ndarray) -> dict[int, Recall]:
    """Return recall at each of RECALL_DEPTHS over the marked probes."""
    return {
        depth: Recall.of(recall_of_probes(found, exact, depth)[probes]) for depth in RECALL_DEPTHS
    }


def check_recall(recall: Recall, target_recall: float, what: str) -> None:
    """Refuse an index that finds too little.

    Raises:
        QualityGateError: Recall@10 is below the target.
    """
    if recall.mean < target_recall:
        raise QualityGateError(
            f"recall@{TUNED_DEPTH} of {what} is {recall.mean:.4f} (95 % interval {recall.low:.4f} "
            f"to {recall.high:.4f}), below --target-recall={target_recall:g} even with the largest "
            "effort; nothing was published, finished shards are kept. Choose a factory with more "
            "bytes a vector, such as IVF4096,SQfp16, or lower the target knowingly"
        )
