"""Candidates from wherever they lie, part by part, as one row a pair. Imports no torch.

A run names documents whose texts are elsewhere. Long rows and nested lists bring their texts; both
are read as a corpus is: a long row is a document with the query beside it, a nested row is a query
with its documents beside it. So they come in every format of a corpus, and what is broken in them
is rejected with the same reasons.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.corpus import reasons
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.documents import cut_texts
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.reading import UnitRows, read_unit
from qbatch.corpus.spans import Unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError, NoInputError, SourceChangedError
from qbatch.evaluation.reading import read_run
from qbatch.manifest import latest_generation, load_generation
from qbatch.pipelines.rerank_lists import NestedColumns, flatten_lists
from qbatch.pipelines.rerank_pairs import PAIRS, numbers, pair_rejects
from qbatch.schema import REJECTS, RUN
from qbatch.storage import Storage, object_info
from qbatch.tables import PublishedTable, open_table

_ROW_BYTES = 24
"""Of a published run, for planning: ids compress well, scores do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateSource:
    """Where candidates lie and how they are read; it travels."""

    kind: Literal["run", "long", "nested"]
    corpus: CorpusConfig
    """How long rows and nested lists are read; of a run, ``input`` is its URI."""
    columns: NestedColumns
    query_column: str
    generation: int | None = None
    """Of a published run; None is the newest."""

    @property
    def has_texts(self) -> bool:
        """Whether queries and documents come with the candidates."""
        return self.kind != "run"

    def parts(self) -> Iterator[tuple[str, int]]:
        """Yield what ``read_pairs`` reads at a time, as JSON, each with about its bytes.

        Raises:
            NoInputError: There is nothing.
        """
        if self.kind != "run":
            for unit in plan_units(self.corpus):
                yield unit.to_json(), _unit_bytes(unit, self.corpus.unit_bytes)
            return
        yield from _run_parts(self.corpus.input, self.generation)


def candidate_source(
    corpus: CorpusConfig, columns: NestedColumns, *, query_column: str
) -> CandidateSource:
    """Look at the first rows of candidates to tell long rows from nested lists.

    Args:
        corpus: Of long rows: their documents are what is read.
        columns: How everything else is called.
        query_column: Of the query's text.
    """
    long = replace(corpus, keep_columns=columns.of_long_rows(query_column))
    nested = replace(
        corpus,
        id_column=columns.query_id,
        text_column=query_column,
        title_column=None,
        keep_columns=columns.of_lists(),
    )
    first = next(iter(plan_units(nested)))
    rows = read_unit(replace_stop(first), nested).documents
    lists = (columns.documents, columns.plural(columns.text))
    is_nested = any(rows[name].null_count < len(rows) for name in lists) if len(rows) else False
    config = resolve_config(nested if is_nested else long)
    return CandidateSource(
        kind="nested" if is_nested else "long",
        corpus=config,
        columns=columns,
        query_column=query_column,
    )


def replace_stop(unit: Unit) -> Unit:
    """Return the first span of a unit alone: enough to see how its rows look."""
    return Unit(unit.spans[:1])


def run_source(uri: str, columns: NestedColumns, generation: int | None = None) -> CandidateSource:
    """Return the source that a run is; only a published one has generations."""
    return CandidateSource(
        kind="run",
        corpus=CorpusConfig(input=uri),
        columns=columns,
        query_column="",
        generation=generation,
    )


def _unit_bytes(unit: Unit, unit_bytes: int) -> int:
    return sum(
        min(span.size, unit_bytes)
        if span.kind == "rows"
        else (span.stop if span.stop >= 0 else span.size) - span.start
        for span in unit.spans
    )


def _run_parts(uri: str, number: int | None) -> Iterator[tuple[str, int]]:
    storage = Storage(uri)
    generation = latest_generation(storage) if number is None else load_generation(storage, number)
    if generation is not None:
        if not {"query_id", "doc_id"} <= _columns_of(PublishedTable(storage, generation)):
            raise BadInputError(
                f"{uri} holds {generation.kind}, not a run: it has no query_id and doc_id; give "
                "the --output of search_index.py"
            )
        for entry in generation.files.to_pylist():
            part = {"path": entry["path"], "sha256": entry["sha256"], "table": uri}
            yield json.dumps(part), entry["rows"] * _ROW_BYTES
        return
    num_files = 0
    for info in storage.iter_objects():
        if info.path.rpartition("/")[2][:1] not in "._":
            num_files += 1
            yield json.dumps({"uri": info.uri, "version": info.version}), info.size
    if num_files:
        return
    try:
        info = object_info(uri)
    except FileNotFoundError as error:
        raise NoInputError(
            f"there is no run at {uri}; give a published run, a file or a directory of files in "
            "TREC, Parquet or JSON lines"
        ) from error
    yield json.dumps({"uri": info.uri, "version": info.version}), info.size


def _columns_of(table: PublishedTable) -> set[str]:
    first = next(table.iter_tables(), None)
    return set(RUN.names) if first is None else set(first.column_names)


def read_pairs(part: str, source: CandidateSource) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """Return PAIRS, schema.REJECTS and notes of one part.

    Rejected rows that are no pairs count as one pair each, those of a whole object as none.

    Raises:
        SourceChangedError: The part differs from what was planned.
        BadInputError: A file of a run is not one.
    """
    if source.kind == "run":
        return _read_run_part(json.loads(part)), REJECTS.empty_table(), {}
    rows = read_unit(Unit.from_json(part), source.corpus)
    notes = {k: v for k, v in rows.counts.items() if not k.startswith("rejected:")}
    if source.kind == "nested":
        pairs, rejects = flatten_lists(rows.documents, source.columns)
    else:
        pairs, rejects = _long_rows(rows, source)
    limit = source.corpus.max_document_bytes
    columns = {name: pairs[name].combine_chunks() for name in ("query", "text")}
    cut = {name: cut_texts(column, limit)[0] for name, column in columns.items()}
    for name, column in cut.items():
        pairs = pairs.set_column(pairs.schema.get_field_index(name), PAIRS.field(name), column)
    return pairs.select(PAIRS.names).cast(PAIRS), pa.concat_tables([rows.rejects, rejects]), notes


def _read_run_part(part: dict[str, Any]) -> pa.Table:
    if "path" in part:
        run = open_table(part["table"]).read_file({k: part[k] for k in ("path", "sha256")})
        uri = Storage(part["table"]).object_uri(part["path"])
    else:
        uri = part["uri"]
        _check_version(uri, part["version"])
        run = read_run(uri)
    return run_pairs(run, uri)


def _check_version(uri: str, version: str) -> None:
    try:
        found = object_info(uri).version
    except FileNotFoundError:
        found = "none"
    if found != version:
        raise SourceChangedError(
            f"{uri} was replaced or deleted after the job planned its work (version {version}, "
            f"now {found}). Run the job again"
        )


def run_pairs(run: pa.Table, uri: str) -> pa.Table:
    """Return PAIRS of a run's rows; a run without passages names the document as its passage."""
    num_rows = len(run)
    names = run.column_names
    columns: dict[str, Any] = {
        "object_uri": pa.repeat(uri, num_rows),
        "row": pa.array(np.arange(num_rows)),
        "query_id": run["query_id"],
        "doc_id": run["doc_id"],
        "passage_id": run["passage_id"] if "passage_id" in names else run["doc_id"],
        "retrieval_rank": run["rank"] if "rank" in names else pa.nulls(num_rows),
        "retrieval_score": run["score"] if "score" in names else pa.nulls(num_rows),
        "query": pa.nulls(num_rows),
        "text": pa.nulls(num_rows),
    }
    return pa.table(columns).cast(PAIRS)


def _long_rows(rows: UnitRows, source: CandidateSource) -> tuple[pa.Table, pa.Table]:
    documents, columns = rows.documents, source.columns
    query_ids = documents[columns.query_id].cast(pa.large_string())
    pairs = pa.table(
        {
            "object_uri": documents["object_uri"].cast(pa.string()),
            "row": documents["row"],
            "query_id": query_ids.fill_null(""),
            "doc_id": documents["doc_id"],
            "passage_id": documents["doc_id"],
            "retrieval_rank": numbers(documents[columns.rank], pa.int32(), columns.rank),
            "retrieval_score": numbers(documents[columns.score], pa.float32(), columns.score),
            "query": documents[source.query_column].cast(pa.large_string()),
            "text": full_texts(documents),
        }
    )
    named = pc.and_(pc.is_valid(query_ids), pc.is_valid(pairs["query"]))
    lost = pairs.filter(pc.invert(named))
    missing = f"{columns.query_id!r} or {source.query_column!r} is null"
    return pairs.filter(named), pair_rejects(lost, reasons.MISSING_QUERY, missing)


def full_texts(documents: pa.Table) -> pa.ChunkedArray:
    """Return what the model reads of schema.DOCUMENTS: the title, a space and the text."""
    titles = documents["title"].fill_null("")
    joined = pc.binary_join_element_wise(titles, documents["text"], pa.scalar(" ", titles.type))
    return pc.if_else(pc.equal(titles, ""), documents["text"], joined)
