"""Parquet: whole files, joined row groups, or a range of rows of a large row group."""

from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.corpus import reasons
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.readers.columns import (
    DAMAGE_ERRORS,
    check_text_column,
    columnar_rows,
    columns_to_read,
)
from qbatch.corpus.rows import RawRows, Reject, only_rejects
from qbatch.corpus.sources import Source
from qbatch.corpus.spans import Span

_BATCH_BYTES = 32 * 2**20
_MAX_BATCH_ROWS = 65536
_BUFFER_BYTES = 4 * 2**20
"""Read at once of a column of a large row group."""


def read_parquet(source: Source, config: CorpusConfig) -> Iterator[RawRows]:
    """Yield the rows of a span; ``row`` counts from the start of the file.

    A file that cannot be decoded is rejected; rows decoded before the damage are kept. Pages are
    checked against their checksums where the writer stored some.
    """
    if source.span.size == 0:
        reason = reasons.EMPTY_FILE
        yield only_rejects(Reject(reason=reason, detail="no bytes, not even a Parquet footer"))
        return
    num_rows = 0
    try:
        parquet = _open(source.file)
        unusable = check_text_column(parquet.schema_arrow, config)
        if unusable is not None:
            yield only_rejects(unusable)
            return
        for first_row, batch in _iter_batches(parquet, source.span, config):
            num_rows = first_row + len(batch)
            yield columnar_rows(batch, first_row, config)
    except DAMAGE_ERRORS as error:
        detail = f"{error} (after row {num_rows})"
        yield only_rejects(Reject(reason=reasons.CORRUPT_FILE, detail=detail))


def _open(file: IO[bytes]) -> pq.ParquetFile:
    """Open a file; its row groups are fetched whole, unless one is too large to be held so."""
    metadata = pq.read_metadata(file)
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    is_large = any(group.total_byte_size > _BATCH_BYTES for group in groups)
    return pq.ParquetFile(
        file,
        metadata=metadata,
        page_checksum_verification=True,
        pre_buffer=not is_large,
        buffer_size=_BUFFER_BYTES if is_large else 0,
    )


def _iter_batches(
    parquet: pq.ParquetFile, span: Span, config: CorpusConfig
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the batches of a span, each with its first row in the file."""
    columns = columns_to_read(parquet.schema_arrow, config)
    for group, group_row, start, stop in _row_ranges(parquet.metadata, span):
        position = 0
        batch_rows = _batch_rows(parquet.metadata.row_group(group))
        for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=columns):
            first, last = max(start, position), min(stop, position + len(batch))
            if first < last:
                yield group_row + first, batch.slice(first - position, last - first)
            position += len(batch)
            if position >= stop:
                break


def _row_ranges(metadata: pq.FileMetaData, span: Span) -> Iterator[tuple[int, int, int, int]]:
    """Yield row group, its first row in the file, and first and last wanted row within it."""
    row = 0
    origin = None
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if origin is None and group >= span.row_group:
            origin = row
        if origin is not None:
            start = max(0, origin + span.start - row)
            stop = num_rows if span.stop < 0 else min(num_rows, origin + span.stop - row)
            if start < stop:
                yield group, row, start, stop
        row += num_rows


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    rows: int = group.num_rows * _BATCH_BYTES // max(1, group.total_byte_size)
    return max(1, min(rows, _MAX_BATCH_ROWS))
