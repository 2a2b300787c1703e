"""The first stage: read a unit, make the first cut and tokenize it. Imports no torch."""

import functools
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from qbatch.models.hub import resolve_model
from qbatch.models.rerank_tokens import (
    QUERY_TOO_LONG,
    CandidateGroup,
    CandidateTokens,
    PairTokenizer,
    PairTokenizerSpec,
)
from qbatch.pipelines.embed_task import unit_row, unit_table
from qbatch.pipelines.rerank_join import RerankUnit, unit_stats
from qbatch.pipelines.rerank_pairs import check_retrieval, pair_rejects
from qbatch.pipelines.rerank_task import RerankStage, RerankTask, query_bounds, tokens_table
from qbatch.pipelines.segment_files import read_segment, table_of
from qbatch.storage import Storage


def read_and_tokenize_pairs(batch: pa.Table, *, task: RerankTask) -> pa.Table:
    """Turn a planned unit into tokens for every model, pairs without texts, and rejects."""
    started = time.perf_counter()
    unit = RerankUnit.from_json(batch["spans"][0].as_py())
    row = table_of(read_segment(Storage(task.output), unit.segment))
    pairs, rejects = unit_table(row, "pairs"), unit_table(row, "rejects")
    stats = unit_stats(row)
    check_retrieval(pairs, needs_rank=task.depth is not None, needs_score=False, flag="--cascade")
    bounds = query_bounds(pairs)
    stats["cut"] = 0
    if task.depth is not None:
        places = np.arange(len(pairs)) - np.repeat(bounds[:-1], np.diff(bounds))
        kept = places < task.depth
        stats["cut"] = int(len(kept) - kept.sum())
        pairs = pairs.filter(pa.array(kept))
    read_s = time.perf_counter() - started
    pairs, tokens, too_long = tokenize_pairs(pairs, task.stages)
    stats["seconds"] = {"read": read_s, "tokenize": time.perf_counter() - started - read_s}
    tables = {f"tokens_{i}": tokens_table(groups) for i, groups in tokens.items()}
    return unit_row(
        batch["unit_key"][0].as_py(),
        stats,
        pairs=pairs.drop_columns(["query", "text"]),
        rejects=pa.concat_tables([rejects, too_long]),
        **tables,
    )


def tokenize_pairs(
    pairs: pa.Table, stages: Sequence[RerankStage]
) -> tuple[pa.Table, dict[int, list[CandidateTokens]], pa.Table]:
    """Return the pairs that every model can read, their tokens by stage, and the others' rejects.

    Args:
        pairs: With texts; queries side by side.
        stages: Of the cascade; one that reads the tokens of an earlier one gets none.
    """
    bounds = query_bounds(pairs)
    starts = pairs.take(pa.array(bounds[:-1]))
    queries, texts = starts["query"].to_pylist(), pairs["text"].to_pylist()
    groups = [
        CandidateGroup(query=query, documents=texts[start:stop])
        for query, start, stop in zip(queries, bounds[:-1], bounds[1:], strict=True)
    ]
    tokens = {
        i: _tokenizer(
            stage.model, stage.revision, stage.spec, stage.max_tokens, stage.instruction
        ).encode(groups)
        for i, stage in enumerate(stages)
        if stage.tokens == i
    }
    refused = {
        g: group.detail
        for encoded in tokens.values()
        for g, group in enumerate(encoded)
        if group.reason is not None
    }
    rejects = [
        pair_rejects(pairs.slice(bounds[g], bounds[g + 1] - bounds[g]), QUERY_TOO_LONG, str(detail))
        for g, detail in sorted(refused.items())
    ]
    kept = np.repeat([g not in refused for g in range(len(groups))], np.diff(bounds)).astype(bool)
    good = {
        i: [group for g, group in enumerate(encoded) if g not in refused]
        for i, encoded in tokens.items()
    }
    nothing = pair_rejects(pairs.slice(0, 0), QUERY_TOO_LONG, "")
    return pairs.filter(pa.array(kept)), good, pa.concat_tables([nothing, *rejects])


@functools.lru_cache(maxsize=4)
def _tokenizer(
    model: str,
    revision: str | None,
    spec: PairTokenizerSpec,
    max_tokens: int,
    instruction: str | None,
) -> PairTokenizer:
    return PairTokenizer.load(
        resolve_model(model, revision), spec, max_tokens=max_tokens, instruction=instruction
    )
