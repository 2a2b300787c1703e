"""The compute dtype of a pool: "auto" is decided where the model will run."""

from typing import Literal

import ray

from qbatch.models.embedder import resolve_device, resolve_dtype
from qbatch.pipelines.cluster import PoolPlan
from qbatch.schema import ComputeDtype


def compute_dtype(dtype: Literal["auto"] | ComputeDtype, pool: PoolPlan) -> ComputeDtype:
    """Resolve "auto" on the hardware that will compute, which may not be the driver's."""
    if dtype != "auto":
        return dtype
    resolve = ray.remote(num_gpus=pool.gpus_per_actor, num_cpus=0)(_native_dtype)
    return ray.get(resolve.remote())


def _native_dtype() -> ComputeDtype:
    return resolve_dtype("auto", resolve_device())
