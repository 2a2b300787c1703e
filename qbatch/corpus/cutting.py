"""Cutting an object larger than a unit into the spans of several units."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pyarrow.parquet as pq

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.formats import compression_of, format_of
from qbatch.corpus.readers.columns import DAMAGE_ERRORS, check_text_column
from qbatch.corpus.sources import open_random_access
from qbatch.corpus.spans import Span, Unit, even_ranges
from qbatch.storage import ObjectInfo

_LOGGER = logging.getLogger(__name__)

_LARGE_WHOLE_UNITS = 8
_MAX_EXPANSION = 10_000


def cut_object(info: ObjectInfo, config: CorpusConfig) -> list[Unit]:
    """Return units of about ``config.unit_bytes`` that cover one object.

    Compressed lines and CSV cannot be entered in the middle and stay whole, with a warning when
    that makes a very large unit. So does a Parquet file whose footer cannot be read or whose text
    column cannot be used: the reader rejects it, once.
    """
    whole = Span(info.uri, info.size, info.version)
    file_format = format_of(info.path, config.format)
    if file_format == "parquet":
        return [Unit((span,)) for span in _cut_parquet(whole, config)]
    if file_format in ("jsonl", "text-lines") and compression_of(info.path) is None:
        return [Unit((span,)) for span in _cut_bytes(whole, config.unit_bytes)]
    if file_format != "text" and info.size > _LARGE_WHOLE_UNITS * config.unit_bytes:
        _LOGGER.warning(
            "%s has %d bytes and must be read whole, as a unit of %.0f times the usual size; store "
            "it as Parquet, uncompressed JSON lines or smaller objects to spread the work",
            info.uri,
            info.size,
            info.size / config.unit_bytes,
        )
    return [Unit((whole,))]


def _cut_bytes(whole: Span, unit_bytes: int) -> Iterator[Span]:
    for start, stop in even_ranges(whole.size, unit_bytes):
        yield replace(whole, kind="bytes", start=start, stop=stop)


def _cut_parquet(whole: Span, config: CorpusConfig) -> list[Span]:
    try:
        with open_random_access(whole) as file:
            parquet = pq.ParquetFile(file)
            if check_text_column(parquet.schema_arrow, config) is not None:
                return [whole]
            groups = list(_row_groups(parquet.metadata))
    except DAMAGE_ERRORS:
        return [whole]
    if not _is_plausible(groups, whole.size):
        return [whole]
    return list(_join_row_groups(whole, groups, config.unit_bytes)) or [whole]


def _row_groups(metadata: pq.FileMetaData) -> Iterator[tuple[int, int]]:
    """Yield rows and uncompressed bytes, of all columns, of every row group.

    The sizes of the columns to read would be closer to the work, but pyarrow 26 ends the process
    when it is asked for a damaged column entry.
    """
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        yield group.num_rows, group.total_byte_size


def _is_plausible(groups: list[tuple[int, int]], size: int) -> bool:
    """Tell whether a footer makes sense: a false one must not make a plan without end."""
    total_bytes = sum(num_bytes for _, num_bytes in groups)
    return total_bytes <= _MAX_EXPANSION * size and all(min(group) >= 0 for group in groups)


def _join_row_groups(
    whole: Span, groups: Iterable[tuple[int, int]], unit_bytes: int
) -> Iterator[Span]:
    """Yield spans of adjacent row groups up to a unit; a larger row group becomes row ranges."""
    first = joined_rows = joined_bytes = 0
    for i, (num_rows, num_bytes) in enumerate(groups):
        if joined_rows and joined_bytes + num_bytes > unit_bytes:
            yield _rows(whole, first, 0, joined_rows)
            joined_rows = joined_bytes = 0
        if num_bytes > unit_bytes:
            rows_per_unit = max(1, num_rows * unit_bytes // num_bytes)
            for start, stop in even_ranges(num_rows, rows_per_unit):
                yield _rows(whole, i, start, stop)
            continue
        if not joined_rows:
            first = i
        joined_rows += num_rows
        joined_bytes += num_bytes
    if joined_rows:
        yield _rows(whole, first, 0, joined_rows)


def _rows(whole: Span, row_group: int, start: int, stop: int) -> Span:
    return replace(whole, kind="rows", row_group=row_group, start=start, stop=stop)
