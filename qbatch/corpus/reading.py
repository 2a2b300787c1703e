"""Reading a unit: its spans become documents and rejects, and every row is accounted for."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import pyarrow as pa

from qbatch import schema
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.documents import judge_rows
from qbatch.corpus.formats import ObjectFormat, format_of
from qbatch.corpus.huggingface import read_dataset
from qbatch.corpus.kept_columns import concat_documents
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.readers.delimited import read_csv
from qbatch.corpus.readers.jsonl import read_jsonl
from qbatch.corpus.readers.parquet import read_parquet
from qbatch.corpus.readers.text import read_text, read_text_lines
from qbatch.corpus.reasons import DROPPED_REASONS, KILLED_READER
from qbatch.corpus.rows import RawRows, Reject
from qbatch.corpus.sources import Source, iter_sources
from qbatch.corpus.spans import Span, Unit
from qbatch.errors import BadInputError

_READERS: dict[ObjectFormat, Callable[[Source, CorpusConfig], Iterator[RawRows]]] = {
    "parquet": read_parquet,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "text": read_text,
    "text-lines": read_text_lines,
}

_resolve_once = lru_cache(maxsize=16)(resolve_config)


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The rows of one unit; ``rows_in`` = documents + rejects that have a row."""

    documents: pa.Table
    """schema.DOCUMENTS, then the columns to keep, in corpus order."""
    rejects: pa.Table
    """schema.REJECTS; empty when bad rows are skipped."""
    rows_in: int
    counts: dict[str, int]
    """``rejected:<reason>`` whatever the policy, and repairs: ``generated_ids``,
    ``truncated_documents``, ``repaired_surrogates`` and ``repaired_utf8`` (values),
    ``documents_with_controls``; only what is above 0."""


def read_unit(unit: Unit, config: CorpusConfig) -> UnitRows:
    """Return the documents of a unit, those it rejects, and the counts of both.

    Raises:
        SourceChangedError: An input object differs from the plan, or is gone.
        BadInputError: ``on_bad_row`` is "fail" and there is a bad row or object.
        StorageError: The store failed.
    """
    config = _resolve_once(config)
    documents: list[pa.Table] = []
    rejects: list[pa.Table] = []
    counts: Counter[str] = Counter()
    rows_in = 0
    for span, raw in _iter_raw_rows(unit, config):
        judged = judge_rows(raw, span.uri, config)
        if config.on_bad_row == "fail":
            _fail_on_bad(span.uri, judged.rejects)
        documents.append(judged.documents)
        if judged.rejects:
            rejects.append(_reject_table(span.uri, judged.rejects))
        counts += judged.counts + Counter(f"rejected:{r.reason}" for r in judged.rejects)
        rows_in += judged.documents.num_rows + sum(r.row is not None for r in judged.rejects)
    if config.on_bad_row == "skip":
        rejects = []
    return UnitRows(
        documents=concat_documents(documents, config.keep_columns),
        rejects=pa.concat_tables([schema.REJECTS.empty_table(), *rejects]),
        rows_in=rows_in,
        counts=dict(counts),
    )


def reject_spans(rows: UnitRows, spans: Sequence[Span], config: CorpusConfig) -> UnitRows:
    """Add rejects for spans that were not read, since reading them kills the process.

    Raises:
        BadInputError: ``on_bad_row`` is "fail" and there are some.
    """
    if not spans:
        return rows
    rejects, counts = [rows.rejects], Counter(rows.counts)
    for span in spans:
        detail = f"every process that read or tokenized {span} died"
        reject = Reject(reason=KILLED_READER, detail=detail)
        if config.on_bad_row == "fail":
            _fail_on_bad(span.uri, [reject])
        counts[f"rejected:{KILLED_READER}"] += 1
        if config.on_bad_row == "quarantine":
            rejects.append(_reject_table(span.uri, [reject]))
    return replace(rows, rejects=pa.concat_tables(rejects), counts=dict(counts))


def _iter_raw_rows(unit: Unit, config: CorpusConfig) -> Iterator[tuple[Span, RawRows]]:
    if config.format == "hf":
        for span in unit.spans:
            yield from ((span, raw) for raw in read_dataset(span, config))
        return
    for source in iter_sources(unit.spans):
        with source.file:
            yield from ((source.span, raw) for raw in _reader(source, config)(source, config))


def _reader(
    source: Source, config: CorpusConfig
) -> Callable[[Source, CorpusConfig], Iterator[RawRows]]:
    file_format = format_of(source.name, config.format)
    if file_format is None:
        raise ValueError(
            f"{source.span.uri} has no known format; was the plan made with this config?"
        )
    return _READERS[file_format]


def _fail_on_bad(uri: str, rejects: list[Reject]) -> None:
    bad = next((r for r in rejects if r.reason not in DROPPED_REASONS), None)
    if bad is None:
        return
    where = uri if bad.row is None else f"{uri}, row {bad.row}"
    raise BadInputError(
        f"bad input in {where}: {bad.reason} ({bad.detail}). on_bad_row is 'fail', which allows "
        "none; mend the object, or set on_bad_row to 'quarantine' or 'skip'"
    )


def _reject_table(uri: str, rejects: list[Reject]) -> pa.Table:
    columns = [
        [uri] * len(rejects),
        [r.row for r in rejects],
        [r.doc_id for r in rejects],
        [r.reason for r in rejects],
        [r.detail for r in rejects],
        [r.raw for r in rejects],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema.REJECTS, strict=True)]
    return pa.table(arrays, schema=schema.REJECTS)
