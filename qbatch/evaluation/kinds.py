"""The two kinds of table that evaluation reads, and the names their columns go by elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from qbatch.errors import BadInputError
from qbatch.schema import QRELS, RUN

_BEIR_IDS = {"query-id": "query_id", "corpus-id": "doc_id"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TableKind:
    """What a run, or a set of judgements, must and may hold."""

    name: str
    """As messages call it."""
    forms: str
    """What can be given, as messages say it."""
    schema: pa.Schema
    """The columns that are read; all others are ignored."""
    needs: Sequence[Sequence[str]]
    """Columns without which there is nothing to evaluate: one of every group."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of other tools, to the column they mean."""
    trec_fields: Sequence[str]
    """The fields of a line of TREC text in order; those that are no columns are ignored."""

    def schema_of(self, columns: Sequence[str]) -> pa.Schema:
        """Return the schema of a table that has these columns."""
        return pa.schema([self.schema.field(name) for name in columns])

    def columns_of(self, names: Sequence[str], uri: str) -> dict[str, str]:
        """Return which columns of a file are read, as name in the file to our name.

        Our own names win over aliases.

        Raises:
            BadInputError: A column is missing or there twice.
        """
        own = [name for name in names if name in self.schema.names]
        columns = {name: name for name in own} | {
            name: column
            for name, column in self.aliases.items()
            if name in names and name not in own and column not in own
        }
        found = set(columns.values())
        is_complete = not any(found.isdisjoint(group) for group in self.needs)
        if not is_complete or any(names.count(name) > 1 for name in columns):
            needed = ", ".join(" or ".join(group) for group in self.needs)
            raise BadInputError(
                f"{uri} has the columns {', '.join(names)}; a {self.name} needs {needed}, each "
                "once. Rename or add them"
            )
        return columns


RUNS = TableKind(
    name="run",
    forms="a file or a published table",
    schema=pa.schema([RUN.field(name) for name in ("query_id", "doc_id", "rank", "score")]),
    needs=(("query_id",), ("doc_id",), ("rank", "score")),
    aliases=_BEIR_IDS,
    trec_fields=("query_id", "Q0", "doc_id", "rank", "score", "tag"),
)
"""Passages are not read apart: a document counts once, at its best rank."""

JUDGEMENTS = TableKind(
    name="set of judgements",
    forms="a file, a published table or a BEIR folder, which has qrels/",
    schema=QRELS,
    needs=[(name,) for name in QRELS.names],
    aliases={**_BEIR_IDS, "score": "relevance"},
    trec_fields=("query_id", "iteration", "doc_id", "relevance"),
)
