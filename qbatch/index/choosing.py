"""``--factory auto``: from size, memory and target recall to a factory string, with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

from qbatch.errors import ConfigError
from qbatch.index.columns import Metric
from qbatch.index.factory import bytes_per_row, fixed_bytes, make_index
from qbatch.index.neighbours import Neighbours, exact_neighbours
from qbatch.index.recall import TUNED_DEPTH, recall_of_probes

_EXACT_ROWS = 20_000
"""Up to here a scan of everything takes a query under a millisecond or two: no lists needed."""

_HNSW_COARSE_LISTS = 2**16
"""From here finding the nearest lists costs more than reading them; a graph finds them faster."""

_TRIAL_PROBES = 200
TRIAL_ROWS = 20_000
"""What a trial of codecs looks at; more would not change the choice."""

_CODECS = ("SQ8", "SQfp16", "Flat")
"""By bytes a row. Finding vectors costs what is read, so the smallest that is good enough."""

_TIGHT_CODECS = ("SQ6", "SQ4")
"""Only for a budget that the others break."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A factory and why."""

    factory: str
    reason: str


def lists_for(ntotal: int) -> int:
    """Return the number of inverted lists: the power of two next to 4 * sqrt(rows).

    Searching costs about as much for lists as for rows then (faiss wiki, and autofaiss's rule).
    """
    return int(2 ** np.rint(np.log2(4 * np.sqrt(max(ntotal, 1)))))


def training_rows_for_choice(ntotal: int) -> int:
    """Return how large a sample the choice and the training after it want."""
    return min(ntotal, max(lists_for(ntotal) * 128, 65_536))


def choose_factory(
    sample: np.ndarray, *, ntotal: int, metric: Metric, budget_bytes: int, target_recall: float
) -> Choice:
    """Choose by trial: codecs are tried on the sample, from cheap to dear.

    A codec must lose at most half of what the target allows to be lost; the rest is left to the
    inverted lists.

    Args:
        sample: float32, (rows, dim), drawn evenly from all vectors.
        ntotal: Rows to index.
        metric: How vectors compare.
        budget_bytes: What the whole index may take in memory.
        target_recall: Of recall@10.

    Raises:
        ConfigError: Nothing that fits is good enough.
    """
    dim = sample.shape[1]
    flat_bytes = 4 * dim * ntotal
    if ntotal <= _EXACT_ROWS and flat_bytes <= budget_bytes:
        return Choice(
            factory="Flat",
            reason=f"{ntotal:,} vectors are few enough to compare with every one: exact",
        )
    num_lists = lists_for(ntotal)
    coarse = f"IVF{num_lists}" + ("_HNSW32" if num_lists >= _HNSW_COARSE_LISTS else "")
    wanted = (1 + target_recall) / 2
    tried = []
    for codec, needed_bytes in _fitting(coarse, dim, metric, ntotal, budget_bytes):
        kept = codec_recall(codec, sample, metric)
        tried.append(f"{codec} keeps {kept:.3f}")
        if kept >= wanted or (codec in _TIGHT_CODECS and kept >= target_recall):
            return Choice(
                factory=f"{coarse},{codec}",
                reason=f"{ntotal:,} vectors of {dim} components: {num_lists} lists, about 4 * "
                f"sqrt(rows); {codec} keeps {kept:.3f} of the true ten nearest in a sample and "
                f"needs {needed_bytes / 2**30:.2f} of {budget_bytes / 2**30:.1f} GiB",
            )
    raise ConfigError(
        f"no factory fits {ntotal:,} vectors of {dim} components into "
        f"{budget_bytes / 2**30:.2f} GiB with recall {target_recall:g} "
        f"({'; '.join(tried) or 'the smallest codec, SQ4, is too large'}). Give more with "
        "--memory-budget-gib, lower --target-recall, index fewer components with --dim, or name a "
        "--factory such as IVF4096,PQ64 and search it with --rescore"
    )


def _fitting(
    coarse: str, dim: int, metric: Metric, ntotal: int, budget_bytes: int
) -> Iterator[tuple[str, int]]:
    """Yield the codecs that fit the budget with the bytes they need, in order of preference."""
    for codec in (*_CODECS, *_TIGHT_CODECS):
        index = make_index(f"{coarse},{codec}", dim, metric)
        needed = index_bytes(index, ntotal)
        if needed <= budget_bytes:
            yield codec, needed


def index_bytes(index: faiss.Index, ntotal: int) -> int:
    """Return what an index holds in memory with so many rows."""
    return bytes_per_row(index) * ntotal + fixed_bytes(index)


def codec_recall(codec: str, sample: np.ndarray, metric: Metric) -> float:
    """Return the recall@10 of a codec alone, every stored vector compared."""
    if codec == "Flat":
        return 1.0
    probes, stored = sample[:_TRIAL_PROBES], sample[_TRIAL_PROBES : _TRIAL_PROBES + TRIAL_ROWS]
    index = make_index(codec, sample.shape[1], metric)
    index.train(stored)
    index.add(stored)
    found = Neighbours.of(*index.search(probes, TUNED_DEPTH), metric)
    exact = exact_neighbours(probes, stored, 2 * TUNED_DEPTH, metric)
    return float(recall_of_probes(found, exact, TUNED_DEPTH).mean())
