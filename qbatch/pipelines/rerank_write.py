"""The last stage: rank each query's candidates, write rejects and file. Imports no torch."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.corpus.reasons import num_row_rejects
from qbatch.errors import IntegrityError
from qbatch.models.rerank_tokens import scores_from_keys
from qbatch.pipelines.embed_task import unit_table
from qbatch.pipelines.rerank_pairs import check_retrieval
from qbatch.pipelines.rerank_task import RerankTask, query_bounds
from qbatch.pipelines.unit_files import write_rejects, write_unit_file
from qbatch.schema import RERANKED
from qbatch.storage import Storage

_RRF_CONSTANT = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)."""

_NO_RANK = np.iinfo(np.int32).max


def write_ranked(batch: pa.Table, *, task: RerankTask) -> pa.Table:
    """Write one unit's rejects, then its ranked file; return its row of OUTPUTS as JSON."""
    started = time.perf_counter()
    unit_key = batch["unit_key"][0].as_py()
    stats = json.loads(batch["stats"][0].as_py())
    rejects = unit_table(batch, "rejects")
    ranked, num_below = rank_pairs(unit_table(batch, "pairs"), task)
    dropped = {"cascade": stats["cut"], "repeated": stats["repeated"], "top_k": num_below}
    storage = Storage(task.output)
    record = {
        "unit_key": unit_key,
        "fingerprint": task.fingerprint,
        "counts": unit_counts(stats, ranked, rejects, dropped),
        "rejects": write_rejects(storage, unit_key, rejects),
    }
    output = write_unit_file(storage, record, ranked)
    stats["seconds"]["write"] = time.perf_counter() - started
    return pa.table({"output": [json.dumps(output)], "stats": [json.dumps(stats)]})


def unit_counts(
    stats: Mapping[str, Any], ranked: pa.Table, rejects: pa.Table, dropped: Mapping[str, int]
) -> dict[str, Any]:
    """Return what a unit's pairs became, after checking that none is missing.

    Raises:
        IntegrityError: pairs in differ from pairs ranked, rejected and dropped by a rule.
    """
    rejected = Counter(rejects["reason"].to_pylist())
    pairs_in = stats["pairs_in"]
    pairs_out = len(ranked) + num_row_rejects(rejected) + sum(dropped.values())
    if pairs_in != pairs_out:
        raise IntegrityError(
            f"{pairs_in} pairs came in, but {len(ranked)} were ranked, {dict(rejected)} rejected "
            f"and {dict(dropped)} dropped; nothing of this unit was written. This is a bug: report "
            "it with the input"
        )
    return {
        "queries": stats["queries"],
        "pairs": pairs_in,
        "ranked": len(ranked),
        "rejected": dict(sorted(rejected.items())),
        "dropped": {rule: number for rule, number in sorted(dropped.items()) if number},
        "tokens": stats["tokens"],
        "tokens_saved": stats["tokens_saved"],
    }


def rank_pairs(pairs: pa.Table, task: RerankTask) -> tuple[pa.Table, int]:
    """Return schema.RERANKED and how many pairs stand below ``top_k``.

    Rows go by query, then by falling ``log_odds``, retrieval rank, document id; with a fusion by
    falling ``score`` before these.
    """
    check_retrieval(
        pairs,
        needs_rank=task.fusion == "rrf",
        needs_score=task.fusion == "weighted",
        flag=f"--fusion={task.fusion}",
    )
    bounds = query_bounds(pairs)
    queries = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    keys = pairs["log_odds"].to_numpy()
    ranks = pairs["retrieval_rank"].fill_null(_NO_RANK).to_numpy()
    names = pc.rank(pairs["doc_id"].combine_chunks(), tiebreaker="dense").to_numpy()
    order = np.lexsort((names, ranks, -keys, queries))
    places = np.arange(len(pairs)) - np.repeat(bounds[:-1], np.diff(bounds)) + 1
    scores = np.empty(len(pairs), np.float32)
    if task.fusion == "none":
        scores = scores_from_keys(keys, task.stages[-1].spec.scorer)
    else:
        own_ranks = np.empty(len(pairs), np.int64)
        own_ranks[order] = places
        scores = _fused(pairs, task, own_ranks, bounds)
        order = np.lexsort((names, ranks, -keys, -scores, queries))
    is_kept = places <= (task.top_k or len(pairs))
    order, places = order[is_kept], places[is_kept]
    taken = pairs.take(pa.array(order))
    added = {"rank": places.astype(np.int32), "score": scores[order]}
    columns = [pa.array(added[n]) if n in added else taken[n] for n in RERANKED.names]
    return pa.table(columns, schema=RERANKED), len(pairs) - len(order)


def _fused(
    pairs: pa.Table, task: RerankTask, own_ranks: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """Return the fused score of every pair, float32, higher is better."""
    weight = task.fusion_weight
    if task.fusion == "rrf":
        ranks = pairs["retrieval_rank"].to_numpy()
        fused = 1 / (_RRF_CONSTANT + own_ranks) + 1 / (_RRF_CONSTANT + ranks)
    else:
        scores = scores_from_keys(pairs["log_odds"].to_numpy(), task.stages[-1].spec.scorer)
        retrieval = _scaled(pairs["retrieval_score"].to_numpy().astype(np.float64), bounds)
        fused = weight * scores + (1 - weight) * retrieval
    result: np.ndarray = fused.astype(np.float32)
    return result


def _scaled(scores: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return scores moved to 0, a query's lowest, to 1, its highest; 1 where all are equal."""
    if not len(scores):
        return scores
    sizes = np.diff(bounds)
    low = np.repeat(np.minimum.reduceat(scores, bounds[:-1]), sizes)
    high = np.repeat(np.maximum.reduceat(scores, bounds[:-1]), sizes)
    span = np.where(high > low, high - low, 1)
    scaled: np.ndarray = np.where(high > low, (scores - low) / span, 1.0)
    return scaled
