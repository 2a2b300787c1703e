"""FAISS factory strings: what is refused and why, what a row costs, how a search is tuned."""

import re
from dataclasses import dataclass
from typing import Any

import faiss

from qbatch.errors import ConfigError
from qbatch.index.columns import Metric

FAISS_METRICS = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}

_REFUSED = {
    "OPQ": "training its rotation takes hours on processors; RR<dim> rotates at no cost",
    "Panorama": "merging its shards loses rows without an error",
    "IDMap": "ids are rows of the shard here, and keys are joined from the sidecar",
    "Refine|RFlat": "it stores every vector twice; --rescore of the search job reads the table",
    "NSG|NNDescent": "it takes all vectors at once and cannot grow while they are streamed",
    "LSH|Binary": "it does not rank by distance",
}

_HNSW_LINK_BYTES = 4
_ID_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """The one setting that trades time for recall."""

    name: str
    """As in a manifest: "nprobe" or "ef_search"; "" for an index that is always exact."""
    most: int
    """Larger values change nothing."""

    def steps(self) -> list[int]:
        """Return the settings worth trying, in rising order, about 1.4 times apart."""
        if not self.name:
            return [0]
        steps = {1}
        for power in range(20):
            steps |= {2**power, 3 * 2**power // 2}
        least = 1 if self.name == "nprobe" else 16
        return [*sorted(step for step in steps if least <= step < self.most), self.most]


def make_index(factory: str, dim: int, metric: Metric) -> faiss.Index:
    """Return an empty index, trained only if it needs no training.

    Raises:
        ConfigError: FAISS does not know the string, or it is unsafe in a sharded, streamed index.
    """
    for pattern, reason in _REFUSED.items():
        if re.search(pattern, factory):
            raise ConfigError(
                f"--factory={factory!r} is refused: {reason}. Use for example IVF4096,SQ8 or auto"
            )
    try:
        return faiss.index_factory(dim, factory, FAISS_METRICS[metric])
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS cannot make --factory={factory!r} for {dim} components: "
            f"{str(error).splitlines()[-1]}. Use for example Flat, IVF4096,SQ8 or auto"
        ) from error


def inner_index(index: faiss.Index) -> faiss.Index:
    """Return what stores the vectors, behind any transforms."""
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def num_lists(index: faiss.Index) -> int:
    """Return the number of inverted lists, 0 without any."""
    inner = inner_index(index)
    return int(inner.nlist) if isinstance(inner, faiss.IndexIVF) else 0


def bytes_per_row(index: faiss.Index) -> int:
    """Return what a vector takes in memory and on disk, lists' slack not counted."""
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        return int(inner.code_size) + _ID_BYTES
    if isinstance(inner, faiss.IndexHNSW):
        storage = faiss.downcast_index(inner.storage)
        links = inner.hnsw.nb_neighbors(0) * 1.1  # type: ignore[attr-defined]  # not in the stubs
        return int(storage.sa_code_size() + links * _HNSW_LINK_BYTES)  # upper levels: a tenth
    return int(inner.sa_code_size())


def fixed_bytes(index: faiss.Index) -> int:
    """Return what an index takes besides its rows: centroids and tables."""
    return num_lists(index) * int(index.d) * 4 * 2


def effort_of(index: faiss.Index) -> Effort:
    """Return the setting that a search of this index has."""
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        return Effort(name="nprobe", most=int(inner.nlist))
    if isinstance(inner, faiss.IndexHNSW):
        return Effort(name="ef_search", most=1024)
    return Effort(name="", most=0)


def effort_name(factory: str) -> str:
    """Return the name of a factory's effort; "" for an index that is always exact."""
    return "nprobe" if "IVF" in factory else "ef_search" if "HNSW" in factory else ""


def search_parameters(
    index: faiss.Index, effort: int, selector: faiss.IDSelector | None = None
) -> faiss.SearchParameters | None:
    """Return FAISS's parameters for one search call, which keep the selector alive.

    None stands for no parameters: some exact indexes refuse even empty ones.
    """
    inner = inner_index(index)
    if selector is None and not effort_of(index).name:
        return None
    options: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(inner, faiss.IndexIVF):
        parameters = _parameters(_ivf_kind(inner), nprobe=effort, **options)
    elif isinstance(inner, faiss.IndexHNSW):
        parameters = _parameters("SearchParametersHNSW", efSearch=effort, **options)
    else:
        parameters = _parameters("SearchParameters", **options)
    if isinstance(index, faiss.IndexPreTransform):
        return _parameters("SearchParametersPreTransform", index_params=parameters)
    return parameters


def _ivf_kind(index: faiss.IndexIVF) -> str:
    """RaBitQ and PQ take parameters of their own kind; the others share one."""
    if isinstance(index, faiss.IndexIVFRaBitQ):
        return "IVFRaBitQSearchParameters"
    if isinstance(index, faiss.IndexIVFPQ):
        return "IVFPQSearchParameters"
    return "SearchParametersIVF"


def _parameters(kind: str, **options: Any) -> faiss.SearchParameters:  # noqa: ANN401 - FAISS's own
    """Make parameters by keyword, which FAISS's stubs do not know."""
    made: faiss.SearchParameters = getattr(faiss, kind)(**options)
    return made
