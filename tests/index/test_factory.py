"""Factory strings against FAISS itself."""

import faiss
import numpy as np
import pytest

from qbatch.errors import ConfigError
from qbatch.index.factory import (
    bytes_per_row,
    effort_name,
    effort_of,
    make_index,
    num_lists,
    search_parameters,
)
from tests.vector_tables import clustered

FAITHFUL = ["Flat", "SQ8", "SQfp16", "HNSW32", "HNSW16,SQ8", "IVF16,Flat", "IVF16,SQ8"]
LOSSY = ["PQ16x4", "IVF16,PQ16x4", "IVF16_HNSW32,SQ4", "IVF16,RaBitQ4", "PCA48,IVF16,SQ8"]
FACTORIES = [*FAITHFUL, "RR64,IVF16,SQ8", *LOSSY]


@pytest.mark.parametrize("factory", FACTORIES)
def test_bytes_of_a_row_are_what_the_file_grows_by(factory):
    vectors = clustered(4000, 64)
    index = make_index(factory, 64, "l2")
    index.train(vectors)
    empty = faiss.serialize_index(index).nbytes
    index.add(vectors)
    grown = (faiss.serialize_index(index).nbytes - empty) / len(vectors)
    assert bytes_per_row(index) == pytest.approx(grown, rel=0.05)


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_largest_effort_finds_most(factory):
    vectors = clustered(4000, 64)
    index = make_index(factory, 64, "l2")
    index.train(vectors)
    index.add(vectors)
    effort = effort_of(index)
    assert effort.name == effort_name(factory)
    steps = effort.steps()
    assert steps == sorted(set(steps))
    assert steps[-1] == effort.most
    truth = faiss.knn(vectors[:200], vectors, 10)[1]

    def recall(setting: int) -> float:
        found = index.search(vectors[:200], 10, params=search_parameters(index, setting))[1]
        return np.mean([len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]) / 10

    assert recall(steps[-1]) >= recall(steps[0])
    assert recall(steps[-1]) > (0.9 if factory in FAITHFUL else 0.2)


def test_lists_are_counted_behind_transforms():
    assert num_lists(make_index("RR64,IVF32,SQ8", 64, "l2")) == 32
    assert num_lists(make_index("Flat", 64, "l2")) == 0


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("OPQ16,IVF16,PQ16", "hours on processors"),
        ("IVF16,FlatPanorama8", "loses rows without an error"),
        ("IDMap,Flat", "rows of the shard"),
        ("IVF16,PQ16,RFlat", "stores every vector twice"),
        ("NSG32", "cannot grow"),
    ],
)
def test_unsafe_strings_are_refused_with_the_reason(factory, reason):
    with pytest.raises(ConfigError, match=reason):
        make_index(factory, 64, "l2")


@pytest.mark.parametrize("factory", ["IVF16,PQ7", "nonsense", "IVF,Flat"])
def test_impossible_strings_are_refused_with_faiss_words(factory):
    with pytest.raises(ConfigError, match="FAISS cannot make"):
        make_index(factory, 64, "l2")
