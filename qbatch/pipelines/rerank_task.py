"""What travels through the rerank pipeline: settings, and the tokens of a unit's queries.

One Ray row carries one unit through all stages, as in the embed pipeline.
"""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from qbatch.models.rerank_tokens import CandidateTokens, PairTokenizerSpec
from qbatch.models.server import ServerConfig
from qbatch.schema import ComputeDtype

Fusion = Literal["none", "rrf", "weighted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankStage:
    """One model of a cascade; the last has no ``keep``."""

    model: str
    """Directory or hub id; each process resolves it where it runs."""
    revision: str | None
    spec: PairTokenizerSpec
    max_tokens: int
    instruction: str | None
    tokens: int
    """Number of the stage whose tokens this one reads: its own, or an earlier one's like it."""
    keep: int | None = None
    """Candidates of a query that go on to the next stage."""
    server: ServerConfig | None = None
    """Computes the scores; None is the model in each actor. Not in the fingerprint: it has to give
    the scores of the same model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankTask:
    """What every process of a job needs to know; it travels, models do not."""

    output: str
    stages: tuple[RerankStage, ...]
    depth: int | None
    """Candidates of a query, in retrieval order, that any model sees."""
    dtype: ComputeDtype
    token_budget: int | None
    top_k: int | None
    fusion: Fusion
    fusion_weight: float
    fingerprint: str = ""
    """Id of everything besides a unit that changes its output; written into every file."""

    @property
    def needs_models(self) -> bool:
        """Whether actors load any model: not where a server computes the only stage."""
        return any(stage.server is None for stage in self.stages)


_IDS = pa.large_list(pa.int32())

_TOKENS = pa.schema(
    [
        pa.field("before", _IDS),
        pa.field("after", _IDS),
        pa.field("ids", _IDS),
        pa.field("lengths", _IDS),
        pa.field("facts", pa.string()),  # JSON
    ]
)


def tokens_table(groups: list[CandidateTokens]) -> pa.Table:
    """Return the tokens of queries as a table, a row a query; none of them rejected."""
    arrays = {
        name: [np.asarray(getattr(group, name), np.int32) for group in groups]
        for name in ("before", "after", "ids", "lengths")
    }
    facts = [
        json.dumps([group.num_scored, group.document_type, group.num_truncated]) for group in groups
    ]
    columns = [_lists(values) for values in arrays.values()]
    return pa.table([*columns, pa.array(facts, pa.string())], schema=_TOKENS)


def _lists(values: list[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *(len(value) for value in values)])
    flat = np.concatenate([np.empty(0, np.int32), *values])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat))


def tokens_of(table: pa.Table) -> list[CandidateTokens]:
    """Return the queries of ``tokens_table``."""
    columns = [
        [value.values.to_numpy() for value in table[name].combine_chunks()]
        for name in ("before", "after", "ids", "lengths")
    ]
    return [
        CandidateTokens(
            before=before,
            after=after,
            ids=ids,
            lengths=lengths,
            num_scored=facts[0],
            document_type=facts[1],
            num_truncated=facts[2],
        )
        for before, after, ids, lengths, facts in zip(
            *columns, map(json.loads, table["facts"].to_pylist()), strict=True
        )
    ]


def query_bounds(pairs: pa.Table) -> np.ndarray:
    """Return where each query of a table begins, and its end; queries lie side by side."""
    codes = pairs["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    changes = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    return np.concatenate([[0], changes, [len(codes)]]) if len(codes) else np.zeros(1, np.int64)
