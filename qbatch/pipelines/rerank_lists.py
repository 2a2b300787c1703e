"""Nested candidates: a row holds a query and the list of its documents. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from qbatch.corpus import reasons
from qbatch.errors import BadInputError
from qbatch.pipelines.rerank_pairs import numbers, pair_rejects


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedColumns:
    """How the columns of candidates are called."""

    query_id: str
    doc_id: str
    text: str
    rank: str
    score: str
    documents: str

    def plural(self, name: str) -> str:
        """Return the name of a column that holds a list of what ``name`` holds."""
        return f"{name}s"

    def of_long_rows(self, query: str) -> tuple[str, ...]:
        """Return what is kept beside a document in long rows."""
        return (self.query_id, query, self.rank, self.score)

    def of_lists(self) -> tuple[str, ...]:
        """Return what is kept beside a query in nested rows."""
        return (self.documents, *(self.plural(name) for name in self._fields()))

    def _fields(self) -> tuple[str, str, str, str]:
        return (self.doc_id, self.text, self.rank, self.score)


def flatten_lists(rows: pa.Table, columns: NestedColumns) -> tuple[pa.Table, pa.Table]:
    """Return PAIRS columns and schema.REJECTS of nested rows.

    Args:
        rows: schema.DOCUMENTS, of which the text is the query and the id the query's, and the
            columns ``columns.of_lists()``: lists, or JSON of lists.
        columns: Names.

    Raises:
        BadInputError: A column holds no lists, or lists of one row differ in length.
    """
    lists = _lists(rows, columns)
    lengths = {name: pc.list_value_length(values).fill_null(0) for name, values in lists.items()}
    counts = lengths[columns.text].to_numpy(zero_copy_only=False)
    for name, own in lengths.items():
        _check_lengths(own.to_numpy(zero_copy_only=False), counts, rows, name)
    owners = pa.array(np.repeat(np.arange(len(rows)), counts))
    flat = {name: pc.list_flatten(values) for name, values in lists.items()}
    num_pairs = len(owners)
    nothing = pa.nulls(num_pairs)
    texts = _strings(flat[columns.text], columns.text)
    doc_ids = _strings(flat.get(columns.doc_id, nothing), columns.doc_id)
    parents = rows.select(["object_uri", "row", "doc_id", "text"]).take(owners)
    pairs = pa.table(
        {
            "object_uri": parents["object_uri"].cast(pa.string()),
            "row": parents["row"],
            "query_id": parents["doc_id"],
            "doc_id": doc_ids.fill_null(""),
            "passage_id": doc_ids.fill_null(""),
            "retrieval_rank": numbers(flat.get(columns.rank, nothing), pa.int32(), columns.rank),
            "retrieval_score": numbers(
                flat.get(columns.score, nothing), pa.float32(), columns.score
            ),
            "query": parents["text"],
            "text": texts.fill_null(""),
        }
    )
    return _judge(pairs, doc_ids.is_null(), texts.is_null())


def _judge(pairs: pa.Table, no_id: pa.Array, no_text: pa.Array) -> tuple[pa.Table, pa.Table]:
    """Move pairs without an id or a text to the rejects."""
    is_blank = pc.or_(pc.equal(pc.binary_length(pairs["text"]), 0), pc.utf8_is_space(pairs["text"]))
    faults = [
        (no_id, reasons.MISSING_DOCUMENT, "a candidate has no document id"),
        (no_text, reasons.NULL_TEXT, "the candidate's text is null"),
        (is_blank, reasons.EMPTY_TEXT, "the candidate's text is empty or only whitespace"),
    ]
    is_bad = np.zeros(len(pairs), bool)
    rejects = []
    for mask, reason, detail in faults:
        own = mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy()
        rejects.append(pair_rejects(pairs.filter(pa.array(own & ~is_bad)), reason, detail))
        is_bad |= own
    return pairs.filter(pa.array(~is_bad)), pa.concat_tables(rejects)


def _lists(rows: pa.Table, columns: NestedColumns) -> dict[str, pa.Array]:
    """Return doc ids, texts and what else there is as parallel lists, by singular name."""
    found = {
        name: values
        for name in (columns.doc_id, columns.text, columns.rank, columns.score)
        if (values := _list_column(rows, columns.plural(name))) is not None
    }
    documents = _list_column(rows, columns.documents)
    if documents is None or pc.list_flatten(documents).type == pa.null():
        empty = pa.array([[]] * len(rows), pa.list_(pa.large_string()))
        return {columns.text: empty, columns.doc_id: empty, **found}
    values = documents.flatten()
    if not pt.is_struct(values.type):
        return {columns.text: documents, **found}
    offsets = _offsets(documents)
    names = [values.type.field(i).name for i in range(values.type.num_fields)]
    if columns.text not in names:
        raise BadInputError(
            f"the structs in column {columns.documents!r} have the fields {names}; "
            f"{columns.text!r} and {columns.doc_id!r} are needed. Name them with --text-column "
            "and --doc-id-column"
        )
    wanted = [columns.doc_id, columns.text, columns.rank, columns.score]
    return {
        name: pa.LargeListArray.from_arrays(offsets, pc.struct_field(values, name))
        for name in wanted
        if name in names
    }


def _offsets(lists: pa.Array) -> pa.Array:
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())


def _list_column(rows: pa.Table, name: str) -> pa.Array | None:
    """Return a column of lists; None if it is not there."""
    column = rows[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0)
    if column.null_count == len(column):
        return None
    if pt.is_large_string(column.type) or pt.is_string(column.type):
        return _parse_lists(column.to_pylist(), rows, name)
    if not (pt.is_list(column.type) or pt.is_large_list(column.type)):
        raise BadInputError(
            f"column {name!r} of the candidates is {column.type}, not a list; name another with "
            "--documents-column"
        )
    return column


def _parse_lists(texts: Sequence[str | None], rows: pa.Table, name: str) -> pa.Array:
    values = []
    for i, text in enumerate(texts):
        value = None if text is None else _parse(text)
        if text is not None and not isinstance(value, list):
            raise BadInputError(
                f"{name!r} is no list in row {rows['row'][i]} of {rows['object_uri'][i]}: "
                f"{str(text)[:200]!r}. Mend that row"
            )
        values.append(value)
    if any(isinstance(item, Mapping) for value in values for item in value or ()):
        fields = list(
            dict.fromkeys(key for value in values for item in value or () for key in item)
        )
        values = [None if v is None else [_as_text(item, fields) for item in v] for v in values]
        item_type: pa.DataType = pa.struct([(field, pa.large_string()) for field in fields])
    else:
        values = [None if v is None else [_scalar(item) for item in v] for v in values]
        item_type = pa.large_string()
    return pa.array(values, pa.large_list(item_type))


def _parse(text: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(text)
    except ValueError:
        return None  # a string of its own, not a list


def _as_text(item: object, fields: Sequence[str]) -> dict[str, str | None]:
    if not isinstance(item, Mapping):
        return dict.fromkeys(fields)  # rejected for its missing text
    return {field: _scalar(item.get(field)) for field in fields}


def _scalar(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _strings(values: pa.Array, name: str) -> pa.Array:
    try:
        return values.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInputError(
            f"{name!r} in the lists of the candidates is {values.type}, not text: {error}"
        ) from error


def _check_lengths(own: np.ndarray, wanted: np.ndarray, rows: pa.Table, name: str) -> None:
    wrong = np.flatnonzero(own != wanted)
    if len(wrong):
        row = int(wrong[0])
        raise BadInputError(
            f"the list of {name!r} in row {rows['row'][row]} of {rows['object_uri'][row]} has "
            f"{own[row]} items, that of texts {wanted[row]}; all lists of a row are of one length"
        )
