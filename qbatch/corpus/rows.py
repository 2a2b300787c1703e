"""What a reader hands over: well-formed rows that are not judged yet, and what it refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

RAW_LIMIT = 4096
"""Bytes of a rejected row that are kept for inspection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A row, or an object as a whole, that was not read."""

    row: int | None = None
    """None: the object as a whole."""
    reason: str
    """A code of ``corpus.reasons``."""
    detail: str
    doc_id: str | None = None
    raw: bytes | None = None

    def __post_init__(self) -> None:
        if self.raw is not None:
            object.__setattr__(self, "raw", self.raw[:RAW_LIMIT])


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRows:
    """Some rows of one span, in order."""

    rows: pa.Int64Array
    """Row numbers in the object, or byte offsets of lines."""
    doc_ids: pa.Array
    """large_string; null or "" where one has to be generated."""
    titles: pa.Array
    """large_string, or null."""
    texts: pa.Array
    """large_string known to be valid UTF-8, or large_binary to be checked."""
    kept: Mapping[str, pa.Array]
    """Every column of ``keep_columns``; of type null when absent."""
    rejects: list[Reject] = field(default_factory=list)
    """Rows found malformed between these, and faults of the object; in no order."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Repairs made on the way."""


def only_rejects(*rejects: Reject) -> RawRows:
    """Return no rows, with the reasons why."""
    strings = pa.array([], pa.large_string())
    return RawRows(
        rows=pa.array([], pa.int64()),
        doc_ids=strings,
        titles=strings,
        texts=strings,
        kept={},
        rejects=list(rejects),
    )
