"""The compute dtype of a job: "auto" is decided where the model will run."""

from typing import Literal

import ray

from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.schema import ComputeDtype


def compute_dtype(dtype: Literal["auto"] | ComputeDtype, gpus_per_process: float) -> ComputeDtype:
    """Resolve "auto" on the hardware that will compute, which may not be the driver's."""
    if dtype != "auto":
        return dtype
    resolve = ray.remote(num_gpus=gpus_per_process, num_cpus=0)(_native_dtype)
    return ray.get(resolve.remote())


def _native_dtype() -> ComputeDtype:
    return resolve_dtype("auto", resolve_device())
