"""Runs as TREC text, which every other evaluation tool reads."""

from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.errors import BadInputError
from qbatch.evaluation.ranking import rank_documents

_BATCH_ROWS = 100_000

_TEXT = pa.large_string()


def write_trec(run: pa.Table, file: BinaryIO, *, tag: str = "qbatch") -> int:
    """Write a run as lines ``query_id Q0 doc_id rank score tag`` and return their number.

    Lines are in the order of ``rank_documents``, ranks count from 1 without gaps, and a document
    stands once in a query: other tools refuse repeats. Scores are written so that they read back
    as the same float32. Tools that follow trec_eval order by score and not by rank; where scores
    are equal they may see another order than ours.

    Args:
        run: ``query_id``, ``doc_id``, ``score`` and, optionally, ``rank``; other columns are left
            out.
        file: Open for writing bytes.
        tag: Names the system, without whitespace.

    Raises:
        BadInputError: An id is empty or holds whitespace, which TREC cannot express, or there are
            no scores.
    """
    ranking = rank_documents(run)
    if ranking.scores is None:
        raise BadInputError("a TREC run needs scores, this one has ranks only; add a score column")
    _check(pa.array([tag], _TEXT), "tag")
    _check(ranking.query_ids, "query_id")
    _check(ranking.doc_ids, "doc_id")
    queries = np.repeat(np.arange(len(ranking.query_ids)), np.diff(ranking.offsets))
    columns = (pa.array(queries), ranking.doc_ids, pa.array(ranking.positions()), ranking.scores)
    for start in range(0, len(queries), _BATCH_ROWS):
        codes, doc_ids, ranks, scores = (c.slice(start, _BATCH_ROWS) for c in columns)
        query_ids = ranking.query_ids.take(codes)
        file.write(_lines(query_ids, doc_ids, ranks, scores, tag))
    return len(queries)


def _lines(
    query_ids: pa.Array, doc_ids: pa.Array, ranks: pa.Array, scores: pa.Array, tag: str
) -> bytes:
    fields = [query_ids, "Q0", doc_ids, ranks, scores, f"{tag}\n"]
    texts = [
        pa.scalar(field, _TEXT) if isinstance(field, str) else field.cast(_TEXT) for field in fields
    ]
    lines = pc.binary_join_element_wise(*texts, pa.scalar(" ", _TEXT))
    return b"".join(lines.cast(pa.large_binary()).to_pylist())


def _check(values: pa.Array, name: str) -> None:
    is_bad = pc.match_substring_regex(values, r"^$|[ \t\n\v\f\r]")
    row = pc.index(is_bad, True).as_py()
    if row >= 0:
        raise BadInputError(
            f"{name} {values[row].as_py()!r} is empty or holds whitespace, which separates the "
            "fields of TREC text; rename it"
        )
