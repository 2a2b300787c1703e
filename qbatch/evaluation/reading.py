"""Runs and judgements from wherever they lie: published tables, files, BEIR folders.

A file is told by its content and not by its name: gzip around anything, Parquet, or text.
"""

import gzip
import logging
import zlib

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from qbatch.errors import BadInputError, NoInputError
from qbatch.evaluation.kinds import JUDGEMENTS, RUNS, TableKind
from qbatch.evaluation.text_files import parse_text
from qbatch.schema import QRELS
from qbatch.storage import Storage, read_object
from qbatch.tables import open_table

log = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1\x15"
"""The magic and the first byte of every header or footer: a query may be called PAR1."""


def read_run(uri: str) -> pa.Table:
    """Return ``query_id``, ``doc_id`` and those of ``rank`` and ``score`` that the run has.

    Args:
        uri: A published table, or a file: TREC, a table with a header and tabs, JSON lines or
            Parquet; gzipped or not.

    Raises:
        NoInputError: Nothing is there, or no row.
        BadInputError: A row is wrong; file and line are named.
    """
    storage = Storage(uri)
    table = _read_published(storage, RUNS) if _is_directory(storage) else _read_file(uri, RUNS)
    return table.cast(RUNS.schema_of(table.column_names))


def read_qrels(uri: str, split: str = "test") -> pa.Table:
    """Return schema.QRELS without repeated rows.

    Args:
        uri: As for a run, or a folder in the layout of BEIR.
        split: Of a BEIR folder: which file in its ``qrels/``.

    Raises:
        NoInputError: Nothing is there, or no row.
        BadInputError: A row is wrong, or a document is judged twice with different results.
    """
    storage = Storage(uri)
    if not _is_directory(storage):
        table = _read_file(uri, JUDGEMENTS)
    elif splits := _beir_splits(storage):
        table = _read_file(_split_uri(storage, splits, split), JUDGEMENTS)
    else:
        table = _read_published(storage, JUDGEMENTS)
    return _without_repeats(table, uri)


def _is_directory(storage: Storage) -> bool:
    return next(storage.iter_objects(), None) is not None


def _beir_splits(storage: Storage) -> dict[str, str]:
    """Return name and path of every split of a BEIR folder; empty if it is none."""
    paths = [entry.path for entry in storage.iter_objects("qrels")]
    return {path.removeprefix("qrels/").partition(".")[0]: path for path in paths}


def _split_uri(storage: Storage, splits: dict[str, str], split: str) -> str:
    if split not in splits:
        raise NoInputError(
            f"{storage.uri} has no judgements for --split={split}; it has {', '.join(splits)}"
        )
    return storage.object_uri(splits[split])


def _read_published(storage: Storage, kind: TableKind) -> pa.Table:
    if next(storage.iter_objects("manifests"), None) is None:
        raise NoInputError(f"nothing is published in the folder {storage.uri}; give {kind.forms}")
    published = open_table(storage.uri)
    generation = f"generation {published.generation.number} of {storage.uri}"
    parts = [_select(part, kind, generation) for part in published.iter_tables()]
    if not sum(part.num_rows for part in parts):
        raise NoInputError(f"{generation} holds no row; a {kind.name} has one a document and query")
    log.info("read %s", generation)
    return pa.concat_tables(parts)


def _read_file(uri: str, kind: TableKind) -> pa.Table:
    try:
        content = read_object(uri)
    except FileNotFoundError as error:
        raise NoInputError(f"there is no {kind.name} at {uri}; give {kind.forms}") from error
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise BadInputError(f"{uri} is damaged gzip ({error}); copy it again") from error
    if content.startswith(_PARQUET_MAGIC):
        return _parse_parquet(content, kind, uri)
    return parse_text(content, kind, uri)


def _parse_parquet(content: bytes, kind: TableKind, uri: str) -> pa.Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        names = list(kind.columns_of(file.schema_arrow.names, uri))
        table = _select(file.read(columns=names), kind, uri)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{uri} is damaged Parquet ({error}); copy it again") from error
    if not table.num_rows:
        raise NoInputError(f"{uri} holds no row; a {kind.name} has one a document and query")
    return table


def _select(table: pa.Table, kind: TableKind, uri: str) -> pa.Table:
    columns = kind.columns_of(table.column_names, uri)
    selected = {
        column: _cast(table[name], kind.schema.field(column).type, f"column {name!r} of {uri}")
        for name, column in columns.items()
    }
    return pa.table({name: selected[name] for name in kind.schema.names if name in selected})


def _cast(column: pa.ChunkedArray, wanted: pa.DataType, place: str) -> pa.ChunkedArray:
    is_text = pt.is_large_string(wanted)
    if is_text and (pt.is_floating(column.type) or pt.is_temporal(column.type)):
        raise BadInputError(f"{place} is {column.type}; ids are read from strings and integers")
    try:
        values = column.cast(wanted, safe=not pt.is_floating(wanted))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInputError(f"{place} is {column.type}, not {wanted}: {error}") from error
    is_bad = pc.is_null(values, nan_is_null=True)
    row = pc.index(is_bad, True).as_py()
    if row >= 0:
        raise BadInputError(f"{place} is {values[row].as_py()} in row {row} (from 0); fill it")
    return values


def _without_repeats(qrels: pa.Table, uri: str) -> pa.Table:
    judged = qrels.group_by(["query_id", "doc_id"]).aggregate(
        [("relevance", "min"), ("relevance", "max")]
    )
    differs = pc.not_equal(judged["relevance_min"], judged["relevance_max"])
    row = pc.index(differs, True).as_py()
    if row >= 0:
        query_id, doc_id, low, high = (column[row].as_py() for column in judged.columns)
        raise BadInputError(
            f"{uri} judges document {doc_id!r} of query {query_id!r} as {low} and as {high}; "
            "keep one of the lines"
        )
    return judged.drop_columns("relevance_min").rename_columns(QRELS.names).cast(QRELS)
