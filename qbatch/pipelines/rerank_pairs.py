"""The one row of a candidate between its source and the model. Imports no torch."""

import pyarrow as pa

from qbatch.errors import BadInputError
from qbatch.schema import REJECTS

PAIRS = pa.schema(
    [
        pa.field("object_uri", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("query_id", pa.large_string(), nullable=False),
        pa.field("doc_id", pa.large_string(), nullable=False),
        pa.field("passage_id", pa.large_string(), nullable=False),
        pa.field("retrieval_rank", pa.int32()),
        pa.field("retrieval_score", pa.float32()),
        pa.field("query", pa.large_string()),  # null until joined
        pa.field("text", pa.large_string()),  # null until joined
    ]
)
"""Candidates on their way to the model."""


def pair_rejects(pairs: pa.Table, reason: str, detail: str) -> pa.Table:
    """Return schema.REJECTS of some pairs; the query is named in front of ``detail``."""
    queries = pairs["query_id"].to_pylist()
    return pa.table(
        [
            pairs["object_uri"],
            pairs["row"],
            pairs["doc_id"].cast(pa.string()),
            pa.array([reason] * len(pairs), pa.string()),
            pa.array([f"query {query!r}: {detail}" for query in queries], pa.string()),
            pa.nulls(len(pairs), pa.binary()),
        ],
        schema=REJECTS,
    )


def numbers(column: pa.ChunkedArray, data_type: pa.DataType, name: str) -> pa.ChunkedArray:
    """Return ranks or scores that were read as text or as another kind of number.

    Raises:
        BadInputError: Some are no numbers.
    """
    try:
        return column.cast(pa.float64()).cast(data_type, safe=not pa.types.is_floating(data_type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInputError(
            f"column {name!r} of the candidates is {column.type}, not {data_type}: {error}. Mend "
            "it, or name another column"
        ) from error


def check_retrieval(pairs: pa.Table, *, needs_rank: bool, needs_score: bool, flag: str) -> None:
    """Refuse candidates without the retrieval's ranks or scores where a setting builds on them.

    Raises:
        BadInputError: A query lacks them; it is named.
    """
    needed = {"retrieval_rank": needs_rank, "retrieval_score": needs_score}
    for name in (name for name, is_needed in needed.items() if is_needed):
        column = pairs[name]
        if column.null_count:
            query = pairs.filter(column.is_null())["query_id"][0].as_py()
            raise BadInputError(
                f"{flag} needs the {name.replace('_', ' ')} of every candidate; query {query!r} "
                "has candidates without. Give the run's rank or score column, or leave out the flag"
            )
