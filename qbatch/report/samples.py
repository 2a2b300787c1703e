"""A look into published tables for their report: some rows of some files, read by column.

What is read here is drawn, not computed with, so files are not hashed: that would mean reading
gigabytes of vectors for a column of token counts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.storage import redact
from qbatch.tables import PublishedTable

_MAX_FILES = 8
_MAX_ROWS = 400_000
_BATCH_ROWS = 50_000
_ROWS_PER_REASON = 3
_MAX_REJECTS = 20
_MAX_CHARACTERS = 200
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
_BINS = 30
_PERCENTILES = (10, 50, 90)
_MAX_RANKS = 40


def sample_rows(table: PublishedTable, columns: Sequence[str]) -> pa.Table:
    """Return some columns of the first rows of up to 8 files, spread evenly over the table."""
    paths = table.generation.files["path"].to_pylist()
    return _first_rows(table, _spread(paths), columns)


def sample_rejects(table: PublishedTable) -> list[dict[str, Any]]:
    """Return schema.REJECTS of up to 3 rows of each reason, as short printable texts."""
    paths = _spread(table.generation.rejects["path"].to_pylist())
    names = ("reason", "object_uri", "row", "doc_id", "detail", "raw")
    taken: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    for row in _first_rows(table, paths, names).to_pylist():
        taken[row["reason"]] += 1
        if taken[row["reason"]] <= _ROWS_PER_REASON and len(samples) < _MAX_REJECTS:
            raw = row["raw"].decode("utf-8", errors="replace") if row["raw"] is not None else None
            row |= {"object_uri": redact(row["object_uri"]), "raw": raw}
            samples.append({k: clip(v) if isinstance(v, str) else v for k, v in row.items()})
    return samples


def _spread(paths: list[str]) -> list[str]:
    places = np.linspace(0, len(paths) - 1, min(len(paths), _MAX_FILES))
    return [paths[int(place)] for place in places]


def _first_rows(table: PublishedTable, paths: list[str], columns: Sequence[str]) -> pa.Table:
    """Return an equal share of rows from the start of each file."""
    batches = []
    for path in paths:
        left = _MAX_ROWS // len(paths)
        with table.storage.open(path) as file:
            reader = pq.ParquetFile(file)
            for batch in reader.iter_batches(_BATCH_ROWS, columns=list(columns)):
                batches.append(batch.slice(0, left))
                left -= len(batch)
                if left <= 0:
                    break
    return pa.Table.from_batches(batches) if batches else pa.table({name: [] for name in columns})


def clip(text: str) -> str:
    """Return the start of a text, with anything that does not print replaced."""
    short = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
    return "".join(c if c.isprintable() or c in "\n\t" else _UNPRINTABLE for c in short)


def bins(values: np.ndarray, *, whole: bool = False) -> dict[str, list[float]] | None:
    """Count values in bars of equal width.

    Args:
        values: Of shape (n,); what is not finite is left out.
        whole: They are whole numbers, and so shall be the edges.

    Returns:
        ``edges`` and ``counts``, one fewer; None without values.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if whole:
        width = max(1, int(np.ceil((high + 1 - low) / _BINS)))
        edges = np.arange(low, high + 1 + width, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts, _ = np.histogram(values, edges)
    return {"edges": [round(float(edge), 5) for edge in edges], "counts": counts.tolist()}


def percentiles_by_rank(ranks: np.ndarray, values: np.ndarray) -> list[dict[str, float]]:
    """Return the spread of values at up to 40 of the ranks: ``rank``, ``p10``, ``p50``, ``p90``."""
    known = np.unique(ranks)
    if len(known) > _MAX_RANKS:
        known = known[np.unique(np.geomspace(1, len(known), _MAX_RANKS).astype(int) - 1)]
    points = []
    for rank in known.tolist():
        found = np.percentile(values[ranks == rank], _PERCENTILES)
        spread = {f"p{p}": round(float(v), 4) for p, v in zip(_PERCENTILES, found, strict=True)}
        points.append({"rank": rank, **spread})
    return points
