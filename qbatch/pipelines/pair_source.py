"""Training pairs as a job reads them: in units, judged like a corpus, every row accounted for.

A pair is read as its document with the query beside it, so it comes in every format of a corpus,
and what is broken in it is rejected with the same reasons. Imports no torch.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qbatch.corpus.config import CorpusConfig, Format
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.reading import read_unit
from qbatch.corpus.reasons import MISSING_QUERY
from qbatch.corpus.sources import listed_span
from qbatch.corpus.spans import Span, Unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError, ConfigError
from qbatch.manifest import latest_generation
from qbatch.pipelines.conservation import check_balance
from qbatch.schema import REJECTS, TRAINING_PAIRS
from qbatch.storage import Storage

_OWN_COLUMNS = tuple(name for name in TRAINING_PAIRS.names if name not in ("doc_id", "document"))

PAIRS_IDENTITY = (pa.field("object_uri", pa.string()), pa.field("row", pa.int64()))
"""Columns before those of TRAINING_PAIRS while pairs travel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSource:
    """Where pairs lie and how they are read; it travels."""

    corpus: CorpusConfig
    """Reads documents, with the query and all else as kept columns."""
    files: tuple[Span, ...] = ()
    """Of a published table; empty reads what lies at ``corpus.input``."""

    @property
    def keep_columns(self) -> tuple[str, ...]:
        """Columns that follow those of TRAINING_PAIRS."""
        return self.corpus.keep_columns[len(_OWN_COLUMNS) :]

    def plan_units(self) -> Iterator[Unit]:
        """Yield units that cover all pairs once.

        Raises:
            NoInputError: There is nothing to read.
        """
        if not self.files:
            yield from plan_units(self.corpus)
        for span in self.files:
            yield Unit((span,))


@dataclass(frozen=True, slots=True)
class PairRows:
    """The pairs of a unit; ``rows_in`` = pairs + rejects that have a row."""

    pairs: pa.Table
    """PAIRS_IDENTITY, TRAINING_PAIRS and the kept columns, in order. A null ``doc_id`` became
    ``<object name>:<row>``."""
    rejects: pa.Table
    rows_in: int


def pair_source(
    uri: str, *, file_format: Format = "auto", keep_columns: Sequence[str] = (), unit_bytes: int
) -> PairSource:
    """Look at where pairs lie: a published table, or Parquet, JSON lines and the like.

    Raises:
        ConfigError: What is published there are no pairs, or a kept column is one of theirs.
    """
    taken = sorted(set(keep_columns) & set(TRAINING_PAIRS.names))
    if taken:
        raise ConfigError(f"--keep-columns names {taken}, which are kept anyway; leave them out")
    storage = Storage(uri)
    generation = latest_generation(storage)
    corpus = CorpusConfig(
        input=uri,
        format=file_format if generation is None else "parquet",
        text_column="document",
        keep_columns=(*_OWN_COLUMNS, *keep_columns),
        unit_bytes=unit_bytes,
    )
    if generation is None:
        return PairSource(corpus=resolve_config(corpus))
    if generation.kind != "pairs":
        raise ConfigError(
            f"{uri} holds {generation.kind}, not pairs; give the --output of synthesize_pairs.py, "
            "filter_pairs.py or mine_negatives.py, or files with the columns query and document"
        )
    files = tuple(listed_span(storage, entry) for entry in generation.files.to_pylist())
    return PairSource(corpus=corpus, files=files)


def read_pairs(unit: Unit, source: PairSource) -> PairRows:
    """Return the pairs of a unit and what it rejects.

    Raises:
        SourceChangedError: An input object differs from the plan, or is gone.
        IntegrityError: A published file is damaged.
        BadInputError: A column has a type that no pair has.
    """
    rows = read_unit(unit, source.corpus)
    documents = rows.documents.rename_columns(
        ["document" if name == "text" else name for name in rows.documents.column_names]
    )
    columns = [documents["object_uri"].cast(pa.string()), documents["row"]]
    columns += [_cast(documents[field.name], field) for field in TRAINING_PAIRS]
    columns += [documents[name] for name in source.keep_columns]
    kept = [documents.schema.field(name) for name in source.keep_columns]
    fields = [field.with_nullable(True) for field in TRAINING_PAIRS]
    pairs = pa.table(columns, schema=pa.schema([*PAIRS_IDENTITY, *fields, *kept]))
    is_named = pc.invert(_is_blank(pairs["query"]))
    lost = pairs.filter(pc.invert(is_named))
    rejects = reject_pairs(
        lost, [MISSING_QUERY] * len(lost), ["query is null or empty"] * len(lost)
    )
    return PairRows(
        pairs=pairs.filter(is_named).combine_chunks(),
        rejects=pa.concat_tables([rows.rejects, rejects]),
        rows_in=rows.rows_in,
    )


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        if pa.types.is_large_list(field.type) and pa.types.is_large_string(column.type):
            # Line formats give lists as JSON text.
            values = [text and json.loads(text) for text in column.to_pylist()]
            return pa.chunked_array([pa.array(values, field.type)])
        return column.cast(field.type)
    except (ValueError, TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInputError(
            f"column {field.name!r} of the pairs is {column.type}, not {field.type}: {error}. Mend "
            "or rename it"
        ) from error


def _is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    empty = pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
    return pc.fill_null(empty, True)


def reject_pairs(pairs: pa.Table, reasons: Sequence[str], details: Sequence[str]) -> pa.Table:
    """Return schema.REJECTS of some pairs, with what is wrong with each."""
    return pa.table(
        [
            pairs["object_uri"].cast(pa.string()),
            pairs["row"],
            pairs["doc_id"].cast(pa.string()),
            pa.array(reasons, pa.string()),
            pa.array(details, pa.string()),
            pa.nulls(len(pairs), pa.binary()),
        ],
        schema=REJECTS,
    )


def unit_counts(
    rows_in: int,
    rows_out: int,
    rejects: pa.Table,
    what: str,
    dropped: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what a unit's rows became, after checking that none is missing.

    Args:
        rows_in: Rows that were read, rejected ones included.
        rows_out: Rows that something came of.
        rejects: schema.REJECTS.
        what: What a row is, for messages.
        dropped: Rows that fell to a rule and are not listed, by rule.

    Raises:
        IntegrityError: Rows in differ from rows out, rejected and dropped.
    """
    rejected = Counter(rejects["reason"].to_pylist())
    counts = {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "rejected": dict(sorted(rejected.items())),
        **({} if dropped is None else {"dropped": dict(sorted(dropped.items()))}),
    }
    check_balance(counts, what)
    return counts
