"""Training an index once, on an even sample of a vectors table, and keeping the result.

Template and probes are stored under a key of everything they were made from, the record of both
last. A build that was killed afterwards finds them; a later night keeps those of the generation
before.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qbatch.errors import ObjectExistsError
from qbatch.index.choosing import (
    TRIAL_ROWS,
    Choice,
    choose_factory,
    training_rows_for_choice,
)
from qbatch.index.columns import VectorColumn
from qbatch.index.device import faiss_version, use_threads
from qbatch.index.files import upload_named, write_index
from qbatch.index.probes import Probes
from qbatch.index.training import num_training_rows, train_template
from qbatch.manifest import fingerprint_id
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.index_parts import sample_counts
from qbatch.pipelines.index_resources import largest_node
from qbatch.pipelines.index_task import Training
from qbatch.schema import vector_array, vector_matrix
from qbatch.storage import Storage
from qbatch.tables import PublishedTable

log = logging.getLogger(__name__)

_PARTS_PER_TASK = 8
_MAX_SAMPLED_PARTS = 4096
"""A sample of a very large table comes from so many of its files, drawn at random."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRequest:
    """Everything that template and probes depend on, besides the vectors themselves."""

    factory: str
    column: VectorColumn
    seed: int
    num_probes: int
    target_recall: float
    budget_bytes: int
    """Both decide only under ``auto``."""

    def key(self, parts: pa.Table) -> str:
        """Return the name of the training on these vectors."""
        decides = asdict(self)
        if self.factory != "auto":
            del decides["target_recall"], decides["budget_bytes"]
        made_from = {"parts": parts["sha256"].to_pylist(), "faiss": faiss_version()}
        return fingerprint_id(decides | made_from)


def train(
    request: TrainingRequest, table: PublishedTable, parts: pa.Table, output: Storage
) -> Training:
    """Return the training for these vectors, found in storage or made now."""
    path = f"training/{request.key(parts)}.json"
    if output.exists(path):
        log.info("training was finished before: %s", output.object_uri(path))
        return Training(**json.loads(output.read(path)))
    node = largest_node()
    samples = _sample(request, table, parts)
    fit = ray.remote(
        num_cpus=node.cpus,
        num_gpus=min(1, node.gpus),
        max_retries=MAX_RETRIES,
        max_calls=1,  # the sample's memory goes with its process; a shard's task gets another one
    )(_fit)
    ntotal = int(parts["rows"].to_numpy().sum())
    training: Training = ray.get(fit.remote(request, ntotal, output, node.cpus, *samples))
    try:
        output.create(path, json.dumps(asdict(training)).encode())
    except ObjectExistsError:
        return Training(**json.loads(output.read(path)))  # another job was faster
    log.info("trained %s: %s", training.factory, training.reason)
    return training


def choose(request: TrainingRequest, table: PublishedTable, parts: pa.Table) -> Choice:
    """Return what ``auto`` would take, from a small sample read in this process."""
    rng = np.random.default_rng(request.seed)
    rows = parts["rows"].to_numpy()
    counts = sample_counts(rows, TRIAL_ROWS, rng)
    drawn = [
        (part, count, request.seed)
        for part, count in zip(parts.to_pylist(), counts.tolist(), strict=True)
        if count
    ]
    sample = vector_matrix(_draw_rows(table, request.column, drawn)["vector"])
    return _choose(request, int(rows.sum()), sample)


def _choose(request: TrainingRequest, ntotal: int, sample: np.ndarray) -> Choice:
    if request.factory != "auto":
        return Choice(factory=request.factory, reason="as asked for")
    return choose_factory(
        sample,
        ntotal=ntotal,
        metric=request.column.metric,
        budget_bytes=request.budget_bytes,
        target_recall=request.target_recall,
    )


def _sample(request: TrainingRequest, table: PublishedTable, parts: pa.Table) -> list[Any]:
    """Start reading the sample; return a reference to each piece of it."""
    rng = np.random.default_rng(request.seed)
    if len(parts) > _MAX_SAMPLED_PARTS:
        parts = parts.take(np.sort(rng.choice(len(parts), _MAX_SAMPLED_PARTS, replace=False)))
    rows = parts["rows"].to_numpy()
    counts = sample_counts(rows, _sample_size(request, int(rows.sum())), rng)
    draw = ray.remote(max_retries=MAX_RETRIES)(_draw_rows)
    entries = [
        (part, count, request.seed + i)
        for i, (part, count) in enumerate(zip(parts.to_pylist(), counts.tolist(), strict=True))
        if count
    ]
    pieces = [entries[i : i + _PARTS_PER_TASK] for i in range(0, len(entries), _PARTS_PER_TASK)]
    return [draw.remote(table, request.column, piece) for piece in pieces]


def _sample_size(request: TrainingRequest, ntotal: int) -> int:
    if request.factory == "auto":
        return training_rows_for_choice(ntotal) + request.num_probes
    wanted = num_training_rows(request.factory, request.column.dim, request.column.metric)
    return wanted + request.num_probes


def _draw_rows(
    table: PublishedTable, column: VectorColumn, drawn: Sequence[tuple[dict[str, Any], int, int]]
) -> pa.Table:
    """Return ``doc_id`` and ``vector`` of randomly drawn rows of some files."""
    pieces = []
    for part, count, seed in drawn:
        rows = table.read_file(part, ["doc_id", column.name])
        chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
        chosen.sort()
        vectors = vector_array(column.matrix(rows)[chosen])
        pieces.append(pa.table({"doc_id": rows["doc_id"].take(chosen), "vector": vectors}))
    return pa.concat_tables(pieces)


def _fit(
    request: TrainingRequest, ntotal: int, output: Storage, num_threads: int, *samples: pa.Table
) -> Training:
    """Choose the factory if asked to, train it, and store template and probes."""
    started = time.perf_counter()
    use_threads(num_threads)
    vectors, doc_ids = _shuffled(samples, request)
    probe_vectors, sample = np.split(vectors, [request.num_probes])
    choice = _choose(request, ntotal, sample)
    template = train_template(
        choice.factory, request.column.metric, sample, seed=request.seed, use_gpu=True
    )
    probes = Probes(vectors=probe_vectors, doc_ids=doc_ids)
    stem = fingerprint_id(asdict(request) | {"ntotal": ntotal})
    return Training(
        factory=choice.factory,
        reason=choice.reason,
        requested=request.factory,
        probes=_write_probes(output, f"probes/{stem}", probes),
        template=write_index(output, f"templates/{stem}", template),
        seconds=round(time.perf_counter() - started, 3),
    )


def _shuffled(samples: Sequence[pa.Table], request: TrainingRequest) -> tuple[np.ndarray, pa.Array]:
    """Return all vectors in random order, copied once, and the ids of the first, the probes."""
    table = pa.concat_tables(samples)
    order = np.random.default_rng(request.seed).permutation(len(table))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    vectors = np.empty((len(order), request.column.dim), np.float32)
    start = 0
    for chunk in table["vector"].chunks:
        vectors[place[start : start + len(chunk)]] = vector_matrix(chunk)
        start += len(chunk)
    doc_ids = table["doc_id"].take(order[: request.num_probes]).combine_chunks()
    return vectors, doc_ids.cast(pa.large_string())


def _write_probes(output: Storage, stem: str, probes: Probes) -> dict[str, Any]:
    with TemporaryDirectory(prefix="qbatch-probes-") as folder:
        file = Path(folder, "probes.parquet")
        pq.write_table(probes.to_table(), file)
        return upload_named(output, stem, ".parquet", file, len(probes.vectors))
