"""Training an index once: the empty, trained template that every shard is a copy of."""

import hashlib
from dataclasses import dataclass

import faiss
import numpy as np

from qbatch.errors import ConfigError
from qbatch.index.columns import Metric
from qbatch.index.device import train_on_gpu
from qbatch.index.factory import inner_index, make_index, num_lists

ROWS_PER_LIST = 128
"""FAISS warns below 39 and ignores more than 256; see Clustering's defaults."""

_CODEC_ROWS = 65_536
"""What scalar and product quantisers learn from."""

_ITERATIONS = (6, 6)
"""Of k-means on a part of the sample, then on all of it; FAISS makes ten on all."""

_FIRST_PART = 4
"""One in so many vectors finds where centroids lie, the others only move them a little; twelve such
iterations cost three quarters of FAISS's ten, and lists lie as near."""

_HASHED_ROWS = 16_384


def num_training_rows(factory: str, dim: int, metric: Metric) -> int:
    """Return how large a sample a factory is trained on; 0 for one that learns nothing."""
    index = make_index(factory, dim, metric)
    if index.is_trained:
        return 0
    return max(num_lists(index) * ROWS_PER_LIST, _CODEC_ROWS)


def check_trainable(factory: str, dim: int, metric: Metric, num_vectors: int) -> None:
    """Refuse a factory that so many vectors cannot train.

    Raises:
        ConfigError: There are more inverted lists than vectors.
    """
    _check_lists(make_index(factory, dim, metric), factory, num_vectors)


def _check_lists(index: faiss.Index, factory: str, num_vectors: int) -> None:
    if num_vectors < num_lists(index):
        raise ConfigError(
            f"--factory={factory!r} has {num_lists(index)} lists, but there are only "
            f"{num_vectors} distinct vectors to train on; use fewer lists, Flat or auto"
        )


def train_template(
    factory: str, metric: Metric, sample: np.ndarray, *, seed: int, use_gpu: bool = False
) -> faiss.Index:
    """Return a trained index without vectors.

    The same sample, seed and machine give the same template; HNSW coarse quantisers are the
    exception with several threads (faiss issue 983).

    Args:
        factory: As accepted by ``make_index``.
        metric: How vectors compare.
        sample: float32, (rows, dim); repeated vectors count once.
        seed: Of the clustering.
        use_gpu: Assign to centroids on a GPU.

    Raises:
        ConfigError: There are fewer distinct vectors than inverted lists.
    """
    index = make_index(factory, sample.shape[1], metric)
    if index.is_trained:
        return index
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        inner.cp.seed = seed
        inner.cp.max_points_per_centroid = 2 * ROWS_PER_LIST
    distinct = _distinct_rows(sample)
    _check_lists(index, factory, len(distinct))
    with train_on_gpu(index, enabled=use_gpu):
        if isinstance(index, faiss.IndexIVF):
            _train_lists(index, distinct)
        index.train(distinct)
    return index


def _train_lists(ivf: faiss.IndexIVF, sample: np.ndarray) -> None:
    """Find the centroids of inverted lists, on a part of the sample first (nested k-means).

    Leaves other coarse quantisers than a flat one to FAISS, whose ``train`` then finds these lists
    trained.
    """
    quantizer = faiss.downcast_index(ivf.quantizer)
    if not isinstance(quantizer, faiss.IndexFlat) or len(sample) < _FIRST_PART * ivf.nlist:
        return
    assigner = ivf.clustering_index or quantizer
    centroids = np.empty((0, ivf.d), np.float32)
    for part, iterations in zip((sample[::_FIRST_PART], sample), _ITERATIONS, strict=True):
        clustering = faiss.Clustering(ivf.d, ivf.nlist, ivf.cp)
        clustering.niter, clustering.min_points_per_centroid = iterations, 1
        faiss.copy_array_to_vector(centroids.reshape(-1), clustering.centroids)
        clustering.train(np.ascontiguousarray(part), assigner)
        centroids = faiss.vector_to_array(clustering.centroids).reshape(-1, ivf.d)
    quantizer.reset()
    quantizer.add(centroids)


def _distinct_rows(sample: np.ndarray) -> np.ndarray:
    """Drop repeated vectors, which would draw centroids to boilerplate; keep the order."""
    _, key_of, counts = np.unique(_row_keys(sample), return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[key_of] > 1)
    if not len(alike):
        return sample
    rows = sample[alike].view(np.dtype((np.void, sample.itemsize * sample.shape[1])))
    _, first = np.unique(rows.ravel(), return_index=True)
    keep = np.ones(len(sample), bool)
    keep[alike] = False
    keep[alike[first]] = True
    return sample[keep]


def _row_keys(sample: np.ndarray) -> np.ndarray:
    """Return a number for each float32 vector, equal for equal ones: multilinear hashing.

    Sorting these takes a sixth of the time of sorting the vectors, and no copy of them.
    """
    words = np.ascontiguousarray(sample).view(np.uint32)
    factors = np.random.default_rng(0).integers(1, 2**63, words.shape[1], dtype=np.uint64)
    keys = np.empty(len(words), np.uint64)
    for start in range(0, len(words), _HASHED_ROWS):
        part = slice(start, start + _HASHED_ROWS)
        keys[part] = words[part].astype(np.uint64) @ factors
    return keys


@dataclass(frozen=True, slots=True)
class Template:
    """A trained index without vectors, as bytes that travel and have a fingerprint."""

    data: bytes

    @classmethod
    def of(cls, index: faiss.Index) -> "Template":
        """Freeze an index; FAISS writes equal indexes as equal bytes."""
        return cls(faiss.serialize_index(index).tobytes())

    @property
    def sha256(self) -> str:
        """The index fingerprint: shards of different templates must never be merged."""
        return hashlib.sha256(self.data).hexdigest()

    def copy(self) -> faiss.Index:
        """Return an index of its own, to be filled."""
        return faiss.deserialize_index(np.frombuffer(self.data, np.uint8))
