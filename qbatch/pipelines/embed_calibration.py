"""One int8 calibration for all jobs that fill a table: measured once, stored, and then kept."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from qbatch.corpus.reading import read_unit
from qbatch.corpus.spans import Unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError, ObjectExistsError
from qbatch.manifest import fingerprint_id
from qbatch.models.vectors import fit_scale, truncate_normalise
from qbatch.pipelines.cluster import PoolPlan
from qbatch.pipelines.embed_forward import build_embedder, embed_passages
from qbatch.pipelines.embed_read import tokenize
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.pipelines.sampling import sample_evenly
from qbatch.storage import Storage

_SAMPLE_UNITS = 8
_PASSAGES_PER_UNIT = 128


def with_calibration(
    task: EmbedTask, storage: Storage, fingerprint: Mapping[str, Any], pool: PoolPlan
) -> EmbedTask:
    """Return the task with the table's int8 scales, measuring them if there are none yet.

    Args:
        task: Its widths get one scale each.
        storage: The vectors table, which keeps the calibration.
        fingerprint: Of the vectors before rounding; another model gets another calibration.
        pool: What an actor holds; the sample is embedded with the same.
    """
    path = f"calibrations/{fingerprint_id(fingerprint)}.json"
    if storage.exists(path):
        return _stored(task, storage, path)
    measure = ray.remote(num_cpus=pool.cpus_per_actor, num_gpus=pool.gpus_per_actor)(_measure)
    units = sample_evenly(plan_units(task.corpus), _SAMPLE_UNITS)
    scales = ray.get(measure.remote(task, units, pool.threads_per_actor))
    try:
        storage.create(path, json.dumps({"scales": scales}).encode())
    except ObjectExistsError:
        return _stored(task, storage, path)  # another job was faster: one calibration for all
    return replace(task, scales=tuple(scales))


def _stored(task: EmbedTask, storage: Storage, path: str) -> EmbedTask:
    return replace(task, scales=tuple(json.loads(storage.read(path))["scales"]))


def _measure(task: EmbedTask, units: list[Unit], num_threads: int) -> list[float]:
    embedder = build_embedder(task, num_threads)
    vectors = []
    for unit in units:
        documents = read_unit(unit, replace(task.corpus, on_bad_row="skip")).documents
        passages = tokenize(documents.slice(0, _PASSAGES_PER_UNIT), task)
        vectors.append(embed_passages(embedder, passages.slice(0, _PASSAGES_PER_UNIT)))
    matrix = np.concatenate(vectors)
    matrix = matrix[np.isfinite(matrix).all(axis=1)]
    if not len(matrix):
        raise BadInputError(
            f"no usable text in a sample of {len(units)} units to calibrate int8 vectors with; "
            "check --text-column, or use --vector-dtype=float16"
        )
    return [fit_scale(truncate_normalise(matrix, dim)) for dim in task.dims]
