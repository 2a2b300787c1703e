"""What travels through the embed pipeline: the job's settings, and one row for each unit.

One Ray row carries one unit through all stages, as a few binary columns that hold whole Arrow
tables: Ray can neither split a unit nor mix two, and kept columns of any type fit one row schema.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.manifest import fingerprint_id
from qbatch.models.server import ServerConfig
from qbatch.models.tokenization import TokenizerSpec
from qbatch.schema import ComputeDtype, VectorDtype, Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedTask:
    """What every process of a job needs to know; it travels, models do not."""

    corpus: CorpusConfig
    output: str
    model: str
    """Directory or hub id; each process resolves it where it runs."""
    revision: str | None
    tokenizer: TokenizerSpec
    prompt: str
    """Put before every passage."""
    max_tokens: int
    overlap_tokens: int
    dims: tuple[int, ...]
    normalize: bool
    dtype: ComputeDtype
    token_budget: int | None
    vector_dtype: VectorDtype
    weights: Weights = "float"
    scales: tuple[float, ...] = ()
    """int8 only: what each width is multiplied with before rounding."""
    server: ServerConfig | None = None
    """Computes the vectors; None is the model in each actor. Not in the fingerprint: it has to
    give the vectors of the same model."""
    fingerprint: str = ""
    """Id of the embedding fingerprint; written into every file."""

    @property
    def unit_fingerprint(self) -> str:
        """Id of everything but the unit that changes a file: the vectors and how rows are read."""
        return fingerprint_id({"embedding": self.fingerprint, "corpus": self.corpus.fingerprint()})


def unit_row(unit_key: str, stats: Mapping[str, Any], **tables: pa.Table) -> pa.Table:
    """Return the one row that carries a unit to the next stage."""
    columns: dict[str, Any] = {"unit_key": [unit_key], "stats": [json.dumps(stats)]}
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        offsets = pa.array([0, sink.tell()], pa.int64()).buffers()[1]
        columns[name] = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), 1, [None, offsets, sink.getvalue()]
        )
    return pa.table(columns)


def unit_table(batch: pa.Table, name: str) -> pa.Table:
    """Return a table that travels in a binary column, without copying it."""
    return pa.ipc.open_stream(batch[name][0].as_buffer()).read_all()
