"""CSV and TSV with a header line; cells may hold quoted newlines."""

import csv
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from qbatch.corpus import reasons
from qbatch.corpus.compression import DamagedStreamError
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.formats import extension_of
from qbatch.corpus.lines import MAX_LINE_BYTES, LongLine, iter_source_lines
from qbatch.corpus.readers.blocks import empty_compressed
from qbatch.corpus.readers.columns import check_text_column, columnar_rows, columns_to_read
from qbatch.corpus.rows import RawRows, Reject, only_rejects
from qbatch.corpus.sources import Source

_BATCH_RECORDS = 8192

_ENCODING = "latin-1"
"""Maps every byte to a character and back: the parser sees the syntax, never the text."""

_BOM = "\xef\xbb\xbf"


def read_csv(source: Source, config: CorpusConfig) -> Iterator[RawRows]:
    """Yield the rows of a whole object; ``row`` counts records after the header.

    Every cell is a string. Blank lines are no records; a record with too few or too many cells is
    rejected. A line or cell above the line limit, and a damaged stream, end the reading: the
    records before are kept.
    """
    empty = empty_compressed(source)
    if empty is not None:
        yield empty
        return
    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; the default would refuse 128 KiB
    records = _iter_records(source)
    header = next(records, None)
    if header is None:
        header = Reject(reason=reasons.EMPTY_FILE, detail="no header line")
    if isinstance(header, Reject):
        yield only_rejects(header)
        return
    names = [cell.encode(_ENCODING).decode(errors="replace") for cell in header]
    schema = pa.schema([(name, pa.large_string()) for name in names])
    unusable = check_text_column(schema, config)
    if unusable is not None:
        yield only_rejects(unusable)
        return
    yield from _read_batches(records, names, config)


def _iter_lines(source: Source) -> Iterator[str]:
    for lines in iter_source_lines(source):
        if isinstance(lines, LongLine):
            detail = f"the line at byte {lines.offset} has {lines.num_bytes} bytes"
            raise DamagedStreamError(reasons.CORRUPT_FILE, f"{detail}; {MAX_LINE_BYTES} are read")
        content = lines.content().decode(_ENCODING)
        if lines.offset == 0:
            content = content.removeprefix(_BOM)
        yield from (line + "\n" for line in content.split("\n"))


def _iter_records(source: Source) -> Iterator[list[str] | Reject]:
    """Yield the cells of every record that is not blank; a fault comes last, as a reject.

    A record that a fault cuts short is not yielded.
    """
    delimiter = "\t" if extension_of(source.name) == "tsv" else ","
    try:
        yield from filter(None, csv.reader(_iter_lines(source), delimiter=delimiter))
    except DamagedStreamError as damage:
        yield Reject(reason=damage.reason, detail=str(damage))
    except csv.Error as error:
        yield Reject(reason=reasons.CORRUPT_FILE, detail=str(error))


def _read_batches(
    records: Iterator[list[str] | Reject], names: list[str], config: CorpusConfig
) -> Iterator[RawRows]:
    numbered = enumerate(records)
    while batch := list(itertools.islice(numbered, _BATCH_RECORDS)):
        good, rejects = [], []
        for row, record in batch:
            if isinstance(record, Reject):
                rejects.append(record)
            elif len(record) != len(names):
                rejects.append(_wrong_length(row, record, len(names)))
            else:
                good.append((row, record))
        yield _raw_rows(good, rejects, names, config)


def _wrong_length(row: int, record: list[str], num_columns: int) -> Reject:
    detail = f"{len(record)} cells where the header has {num_columns}"
    raw = ",".join(record).encode(_ENCODING)
    return Reject(row=row, reason=reasons.BAD_CSV, detail=detail, raw=raw)


def _raw_rows(
    good: list[tuple[int, list[str]]], rejects: list[Reject], names: list[str], config: CorpusConfig
) -> RawRows:
    schema = pa.schema([(name, pa.large_string()) for name in names])
    columns = {}
    for name in columns_to_read(schema, config):
        index = names.index(name)
        cells = [record[index].encode(_ENCODING) for _, record in good]
        columns[name] = pa.array(cells, pa.large_binary()).view(pa.large_string())
    rows = pa.array([row for row, _ in good], pa.int64())
    raw = columnar_rows(pa.record_batch(columns), 0, config)
    return replace(raw, rows=rows, rejects=rejects)
