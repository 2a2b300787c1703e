"""--dry-run: what a job would do, take and cost, from a plan and a small sample; starts no pool."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.spans import Unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError
from qbatch.pipelines.embed_forward import build_embedder, embed_passages
from qbatch.pipelines.embed_read import tokenize
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.pipelines.sampling import sample_evenly

log = logging.getLogger(__name__)

_SAMPLE_UNITS = 8
_DOCUMENTS_PER_UNIT = 256
_PROBE_TOKENS = 20_000
"""Enough for a few full packs, little enough for a laptop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What the operator knows and a sample cannot tell."""

    tokens_per_s: float | None
    """Of one actor; None measures it in this process."""
    num_actors: int
    gpus_per_actor: float
    gpu_hourly_price: float | None


@dataclass(slots=True)
class _Totals:
    units: int = 0
    num_bytes: int = 0


def estimate(task: EmbedTask, prices: Prices) -> dict[str, Any]:
    """Return units, bytes, token histogram, time, GPU-hours and cost of a job.

    Rows and tokens of the whole are those of the sample, scaled by bytes.

    Raises:
        NoInputError: There is nothing to read.
        BadInputError: The sample holds no usable text.
    """
    totals = _Totals()
    units = _counted(plan_units(task.corpus), task.corpus, totals)
    passages, sampled_bytes, sampled_rows = read_sample(units, task)
    lengths = passages["num_tokens"].to_numpy()
    scale = totals.num_bytes / max(1, sampled_bytes)
    tokens = int(lengths.sum() * scale)
    tokens_per_s = prices.tokens_per_s or _measure_speed(task, passages)
    seconds = tokens / (tokens_per_s * prices.num_actors)
    machine_hours = seconds / 3600 * prices.num_actors * (prices.gpus_per_actor or 1)
    price = prices.gpu_hourly_price
    cost = None if price is None else round(machine_hours * price, 4)
    log.info(
        "dry run: %s units, %s bytes, about %s tokens; %s s on %d actors of %s tokens/s; cost %s",
        *(f"{n:,}" for n in (totals.units, totals.num_bytes, tokens, round(seconds))),
        *(prices.num_actors, f"{tokens_per_s:,.0f}", "unknown" if cost is None else cost),
    )
    return {
        "dry_run": True,
        "units": totals.units,
        "bytes": totals.num_bytes,
        "rows_estimated": int(sampled_rows * scale),
        "passages_estimated": int(len(lengths) * scale),
        "tokens_estimated": tokens,
        "token_histogram": token_histogram(lengths),
        "tokens_per_s_per_actor": round(tokens_per_s, 1),
        "tokens_per_s_measured": prices.tokens_per_s is None,
        "actors": prices.num_actors,
        "seconds_estimated": round(seconds, 1),
        "gpu_hours_estimated": round(machine_hours, 4) if prices.gpus_per_actor else 0.0,
        "cost_estimated": cost,
    }


def _counted(units: Iterable[Unit], corpus: CorpusConfig, totals: _Totals) -> Iterator[Unit]:
    for unit in units:
        totals.units += 1
        totals.num_bytes += _num_bytes(unit, corpus)
        yield unit


def _num_bytes(unit: Unit, corpus: CorpusConfig) -> int:
    """Return the input bytes of a unit; spans of rows are cut to about a unit's size."""
    return sum(
        min(span.size, corpus.unit_bytes)
        if span.kind == "rows"
        else (span.stop if span.stop >= 0 else span.size) - span.start
        for span in unit.spans
    )


def read_sample(units: Iterable[Unit], task: EmbedTask) -> tuple[pa.Table, float, float]:
    """Return tokenized passages of some units and the input bytes and rows they stand for.

    Raises:
        BadInputError: The sample holds no usable text.
    """
    sample = sample_evenly(units, _SAMPLE_UNITS)
    tables, num_bytes, num_rows = [], 0.0, 0.0
    lenient = replace(task.corpus, on_bad_row="skip")
    for unit in sample:
        documents = read_unit(unit, lenient).documents
        some = documents.slice(0, _DOCUMENTS_PER_UNIT)
        if len(some):
            tables.append(tokenize(some, task))
            num_bytes += _num_bytes(unit, task.corpus) * len(some) / len(documents)
            num_rows += len(some)
    if not tables:
        raise BadInputError(
            f"no usable text in a sample of {len(sample)} units of {task.corpus.input}; check "
            f"--text-column={task.corpus.text_column} and --format={task.corpus.format}"
        )
    return pa.concat_tables(tables, promote_options="permissive"), num_bytes, num_rows


def _measure_speed(task: EmbedTask, passages: pa.Table) -> float:
    """Return tokens per second of one actor on this machine, after a warm-up."""
    embedder = build_embedder(task)
    stop = int(np.searchsorted(np.cumsum(passages["num_tokens"].to_numpy()), _PROBE_TOKENS)) + 1
    probe = passages.slice(0, stop)
    embed_passages(embedder, probe.slice(0, 8))
    started = time.perf_counter()
    embed_passages(embedder, probe)
    return float(np.sum(probe["num_tokens"].to_numpy()) / (time.perf_counter() - started))


def token_histogram(lengths: np.ndarray) -> dict[str, int]:
    """Count passages by length in powers of two: ``"33-64"`` to how many."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    edges = {p: "1" if p == 0 else f"{2 ** (p - 1) + 1}-{2**p}" for p in range(powers.max() + 1)}
    return {label: int((powers == power).sum()) for power, label in edges.items()}
