"""A toy corpus that a tiny model learns in seconds: find the note about a word."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = (
    *("apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island"),
    *("jungle", "kettle", "ladder", "mirror", "needle", "orange", "pencil", "quartz", "rocket"),
)
FILLERS = ("old", "new", "red", "big")
VOCABULARY = (*WORDS, *FILLERS, "note", "about", "find")


def write_pairs(
    path: Path,
    num_rows: int,
    *,
    num_negatives: int = 2,
    asked: Sequence[str] = WORDS,
    seed: int = 0,
    row_group: int = 50,
) -> Path:
    """Write pairs whose query names one of the asked words, and whose document does so, too."""
    rng = np.random.default_rng(seed)
    rows = [_pair(rng, i, num_negatives, asked) for i in range(num_rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    return path


def _pair(rng: np.random.Generator, number: int, num_negatives: int, asked: Sequence[str]) -> dict:
    word = str(rng.choice(asked))
    rest = [other for other in WORDS if other != word]
    others = rng.choice(rest, num_negatives, replace=False).tolist()
    return {
        "query_id": f"q{number}",
        "query": f"find {word}",
        "doc_id": word,
        "document": note(rng, word),
        "negatives": [note(rng, other) for other in others],
        "negative_ids": others,
    }


def note(rng: np.random.Generator, word: str) -> str:
    before, after = rng.choice(FILLERS, 2).tolist()
    return f"{before} note about {word} {after}"
