"""The oracle of everything that reads a unit."""

from collections import Counter

import pyarrow as pa

from qbatch import schema
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import UnitRows
from qbatch.corpus.reasons import FILE_REASONS


def check_invariants(rows: UnitRows, config: CorpusConfig) -> None:
    """What must hold of every unit, whatever it was read from."""
    rows.documents.validate(full=True)
    rows.rejects.validate(full=True)
    assert rows.rejects.schema == schema.REJECTS
    assert rows.documents.schema.names == [*schema.DOCUMENTS.names, *config.keep_columns]
    assert pa.schema(list(rows.documents.schema)[: len(schema.DOCUMENTS)]) == schema.DOCUMENTS
    rejected = {k.removeprefix("rejected:"): v for k, v in rows.counts.items() if "rejected" in k}
    num_bad_rows = sum(v for reason, v in rejected.items() if reason not in FILE_REASONS)
    assert rows.rows_in == rows.documents.num_rows + num_bad_rows
    if config.on_bad_row == "quarantine":
        assert Counter(rows.rejects["reason"].to_pylist()) == rejected
        has_row = [row is not None for row in rows.rejects["row"].to_pylist()]
        assert has_row == [r not in FILE_REASONS for r in rows.rejects["reason"].to_pylist()]
