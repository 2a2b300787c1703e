"""Threads and GPUs of FAISS: the only place that moves an index onto a GPU.

The GPU code is short and conventional, and without a GPU nothing of it runs.

One process has one GPU: FAISS's own multi-GPU objects neither train nor add faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss

from qbatch.index.columns import Metric
from qbatch.index.factory import inner_index, make_index

MAX_GPU_DEPTH = 2048
"""Neighbours and probed lists that classic GPU search allows."""

_RESOURCES = "qbatch_resources"
"""Attribute that keeps the GPU's memory pool alive as long as its index, and marks such indexes."""

_SCRATCH_BYTES = 1536 * 2**20

_ON_GPU = (
    faiss.IndexFlat,
    faiss.IndexIVFFlat,
    faiss.IndexIVFScalarQuantizer,
    faiss.IndexIVFPQ,
)


def use_threads(num_threads: int) -> None:
    """Give FAISS calls of the calling thread so many processors: OpenMP keeps it per thread."""
    faiss.omp_set_num_threads(max(1, num_threads))


def faiss_version() -> str:
    """Return FAISS's version; another one may cluster differently."""
    return str(faiss.__version__)


def has_gpu() -> bool:
    """Tell whether this process sees a GPU."""
    return bool(faiss.get_num_gpus())


def fits_gpu_kernels(index: faiss.Index) -> bool:
    """Tell whether classic FAISS has GPU code for an index; otherwise processors do the work."""
    if not isinstance(index, _ON_GPU) or isinstance(index, faiss.IndexIVFPQFastScan):
        return False
    if isinstance(index, faiss.IndexIVFPQ):
        return index.pq.nbits == 8 and index.pq.M <= 64
    return True


def has_gpu_kernels(factory: str, dim: int, metric: Metric) -> bool:
    """Tell the same of a factory string."""
    return fits_gpu_kernels(make_index(factory, dim, metric))


def is_on_gpu(index: faiss.Index) -> bool:
    """Tell whether an index came from ``to_gpu`` and really lies on a GPU."""
    return hasattr(index, _RESOURCES)


def to_gpu(index: faiss.Index, *, rows: int = 0) -> faiss.Index:
    """Return a copy on this process's GPU, or the index itself where there is none for it.

    Args:
        index: On the processor.
        rows: Vectors that will be added, so that lists are allocated once.
    """
    if not has_gpu() or not fits_gpu_kernels(index):
        return index
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH_BYTES)
    options = faiss.GpuClonerOptions()
    # Ids are rows of a shard, and 32 bits take half the memory.
    options.indicesOptions = faiss.INDICES_32_BIT  # type: ignore[attr-defined]  # not in the stubs
    options.reserveVecs = rows
    clone = faiss.index_cpu_to_gpu(resources, 0, index, options)
    setattr(clone, _RESOURCES, resources)
    return clone


def to_cpu(index: faiss.Index) -> faiss.Index:
    """Return an index on the processor: what can be written to a file."""
    return faiss.index_gpu_to_cpu(index) if is_on_gpu(index) else index


def honours_selectors(index: faiss.Index) -> bool:
    """Tell whether a search leaves out rows by itself: classic GPU code ignores it in silence."""
    inner = inner_index(index)
    if is_on_gpu(index) or isinstance(inner, faiss.IndexPQ):
        return False
    return not isinstance(inner, faiss.IndexFastScan)


@contextmanager
def train_on_gpu(index: faiss.Index, *, enabled: bool) -> Iterator[None]:
    """Let the clustering of inverted lists assign on the GPU while the block runs."""
    inner = inner_index(index)
    if not enabled or not has_gpu() or not isinstance(inner, faiss.IndexIVF):
        yield
        return
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH_BYTES)
    inner.clustering_index = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatL2(index.d))
    try:
        yield
    finally:
        inner.clustering_index = None  # type: ignore[assignment]  # FAISS takes it, as in C++
