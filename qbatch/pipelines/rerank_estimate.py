"""--dry-run of reranking: pairs, tokens, time and cost from a small sample; starts no pool."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError
from qbatch.models.rerank_tokens import CandidateTokens
from qbatch.pipelines.embed_estimate import Prices, token_histogram
from qbatch.pipelines.rerank_forward import build_reranker
from qbatch.pipelines.rerank_join import order_candidates
from qbatch.pipelines.rerank_plan import JoinPlan
from qbatch.pipelines.rerank_read import tokenize_pairs
from qbatch.pipelines.rerank_sources import full_texts, read_pairs
from qbatch.pipelines.rerank_task import RerankTask
from qbatch.pipelines.sampling import sample_evenly

log = logging.getLogger(__name__)

_SAMPLE_PARTS = 4
_SAMPLE_UNITS = 4
_SAMPLE_PAIRS = 2_000
_PROBE_TOKENS = 20_000
"""Enough for a few full packs, little enough for a laptop."""


def estimate_reranking(task: RerankTask, plan: JoinPlan, prices: Prices) -> dict[str, Any]:
    """Return pairs, token histogram, time, GPU-hours and cost of a job.

    Pairs of the whole are those of the sample, scaled by bytes. Of a run, texts are drawn from the
    corpus at large: what was retrieved may be longer or shorter. Tokens are those computed when a
    query is computed once; models of a cascade count for what reaches them.

    Raises:
        NoInputError: There is nothing to read.
        BadInputError: The sample holds no usable pair.
    """
    sizes: list[int] = []
    parts = sample_evenly(_counted(plan.source.parts(), sizes), _SAMPLE_PARTS)
    pairs = pa.concat_tables(read_pairs(part, plan.source)[0] for part, _ in parts)
    num_pairs = int(len(pairs) * sum(sizes) / max(1, sum(size for _, size in parts)))
    sample, _ = order_candidates(_with_texts(pairs.slice(0, _SAMPLE_PAIRS), plan))
    sample, tokens, _ = tokenize_pairs(sample, task.stages)
    if not len(sample):
        raise BadInputError("no usable pair in the sample; check the inputs and column names")
    query_size = _mean_query_size(pairs)
    computed, reached = 0.0, query_size if task.depth is None else min(task.depth, query_size)
    for stage in task.stages:
        stems, documents = _lengths(tokens[stage.tokens])
        each = float(documents.mean()) + float(stems.mean()) / max(1.0, reached)
        computed += num_pairs * reached / query_size * each
        reached = reached if stage.keep is None else min(stage.keep, reached)
    tokens_per_s = prices.tokens_per_s or _measure_speed(task, tokens)
    seconds = computed / (tokens_per_s * prices.num_actors)
    machine_hours = seconds / 3600 * prices.num_actors * (prices.gpus_per_actor or 1)
    price = prices.gpu_hourly_price
    log.info("dry run: about %s pairs, %s s", f"{num_pairs:,}", f"{seconds:,.0f}")
    stems, documents = _lengths(tokens[task.stages[-1].tokens])
    return {
        "dry_run": True,
        "pairs_estimated": num_pairs,
        "pairs_per_query": round(query_size, 1),
        "tokens_estimated": int(computed),
        "token_histogram": token_histogram(stems + documents),
        "tokens_per_s_per_actor": round(tokens_per_s, 1),
        "tokens_per_s_measured": prices.tokens_per_s is None,
        "actors": prices.num_actors,
        "seconds_estimated": round(seconds, 1),
        "gpu_hours_estimated": round(machine_hours, 4) if prices.gpus_per_actor else 0.0,
        "cost_estimated": None if price is None else round(machine_hours * price, 4),
    }


def _counted(parts: Iterable[tuple[str, int]], sizes: list[int]) -> Iterator[tuple[str, int]]:
    for part in parts:
        sizes.append(part[1])
        yield part


def _mean_query_size(pairs: pa.Table) -> float:
    return len(pairs) / max(1, len(pairs["query_id"].unique()))


def _with_texts(pairs: pa.Table, plan: JoinPlan) -> pa.Table:
    """Fill queries and texts of a run with some of its own, going round."""
    if plan.queries is None or plan.corpus is None:
        return pairs
    for name, config, ids in (
        ("query", plan.queries, "query_id"),
        ("text", plan.corpus, "doc_id"),
    ):
        texts = _sample_texts(config)
        codes = pairs[ids].combine_chunks().dictionary_encode().indices.to_numpy()
        chosen = texts.take(pa.array(codes % max(1, len(texts))))
        position = pairs.schema.get_field_index(name)
        pairs = pairs.set_column(position, pairs.schema.field(name), chosen)
    return pairs


def _sample_texts(config: CorpusConfig) -> pa.Array:
    lenient = replace(config, on_bad_row="skip")
    units = sample_evenly(plan_units(lenient), _SAMPLE_UNITS)
    tables = [read_unit(unit, lenient).documents.slice(0, _SAMPLE_PAIRS) for unit in units]
    texts = [full_texts(table).combine_chunks() for table in tables if len(table)]
    if not texts:
        raise BadInputError(
            f"no usable text in a sample of {config.input}; check the format and that "
            f"{config.text_column!r} is the column of the text"
        )
    return pa.concat_arrays(chunk for text in texts for chunk in getattr(text, "chunks", [text]))


def _lengths(groups: list[CandidateTokens]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pair the tokens its query shares, and those of its own."""
    sizes = [len(group.lengths) for group in groups]
    stems = np.repeat([len(group.before) for group in groups], sizes)
    own = [group.lengths.astype(np.int64) + len(group.after) for group in groups]
    return stems, np.concatenate([np.empty(0, np.int64), *own])


def _measure_speed(task: RerankTask, tokens: dict[int, list[CandidateTokens]]) -> float:
    """Return computed tokens per second of the last model on this machine, after a warm-up."""
    stage = task.stages[-1]
    reranker = build_reranker(task, stage)
    groups, filled = [], 0
    for group in tokens[stage.tokens]:
        groups.append(group)
        filled += int(group.lengths.sum()) + len(group.before)
        if filled > _PROBE_TOKENS:
            break
    reranker.score_tokens([groups[0].take(np.arange(min(4, len(groups[0].lengths))))])
    before, started = reranker.stats.num_computed, time.perf_counter()
    reranker.score_tokens(groups)
    return (reranker.stats.num_computed - before) / (time.perf_counter() - started)
