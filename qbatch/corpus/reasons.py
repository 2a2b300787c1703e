"""Stable codes that say why a row or an object was not embedded, in rejects and counts."""

from collections.abc import Mapping

CORRUPT_FILE = "corrupt_file"
EMPTY_FILE = "empty_file"
MISSING_TEXT_COLUMN = "missing_text_column"
TEXT_COLUMN_TYPE = "text_column_type"
TRUNCATED_STREAM = "truncated_stream"

BAD_CSV = "bad_csv"
BAD_JSON = "bad_json"
EMPTY_TEXT = "empty_text"
INVALID_UTF8 = "invalid_utf8"
LINE_TOO_LONG = "line_too_long"
NOT_AN_OBJECT = "not_an_object"
NULL_TEXT = "null_text"
TEXT_TYPE = "text_type"
NULL_VECTOR = "null_vector"
ZERO_VECTOR = "zero_vector"
NON_FINITE_VECTOR = "non_finite_vector"
"""The model gave NaN or infinity for a passage; its whole document is rejected."""

KILLED_PROCESS = "killed_process"
"""Every process that computed the row died; its whole document is rejected."""
KILLED_READER = "killed_reader"
"""Every process that read or tokenized this part of an object died."""

MISSING_DOCUMENT = "missing_document"
"""A candidate whose document is not in the corpus, or that names none."""
MISSING_QUERY = "missing_query"
"""A candidate whose query is not among the queries, or that names none."""
NON_FINITE_SCORE = "non_finite_score"
"""The model gave NaN or infinity for a pair."""

EVALUATION_LEAK = "evaluation_leak"
"""The query of a training pair is, or nearly is, one of an evaluation set."""
LOW_COSINE = "low_cosine"
"""Query and document of a training pair are less similar than was asked for."""
LOW_RANK = "low_rank"
"""The query of a training pair finds too many other documents before its own."""
EXACT_DUPLICATE = "exact_duplicate"
NEAR_DUPLICATE = "near_duplicate"
"""An earlier training pair says the same, or nearly the same."""

FILE_REASONS = frozenset(
    {
        CORRUPT_FILE,
        EMPTY_FILE,
        KILLED_READER,
        MISSING_TEXT_COLUMN,
        TEXT_COLUMN_TYPE,
        TRUNCATED_STREAM,
    }
)
"""Reasons that concern an object as a whole; their rejects have no row and count no row."""

DROPPED_REASONS = frozenset(
    {EMPTY_TEXT, EVALUATION_LEAK, LOW_COSINE, LOW_RANK, EXACT_DUPLICATE, NEAR_DUPLICATE}
)
"""Reasons that follow a rule and are not faults: such rows never fail a job."""


def num_row_rejects(rejected: Mapping[str, int]) -> int:
    """Return how many rows stand behind counts by reason; faults of whole objects are no rows."""
    return sum(n for reason, n in rejected.items() if reason not in FILE_REASONS)


def num_bad_rows(rejected: Mapping[str, int]) -> int:
    """Return how many of these rows are faulty; what falls to a rule is not."""
    by_rule = sum(rejected.get(reason, 0) for reason in DROPPED_REASONS)
    return num_row_rejects(rejected) - by_rule
