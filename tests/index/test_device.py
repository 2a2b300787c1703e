"""What GPU code can hold, and the same results on a GPU where there is one."""

import numpy as np
import pytest

from qbatch.index.device import (
    has_gpu,
    has_gpu_kernels,
    honours_selectors,
    is_on_gpu,
    to_cpu,
    to_gpu,
    train_on_gpu,
)
from qbatch.index.neighbours import search_index
from qbatch.index.training import Template, train_template
from tests.vector_tables import clustered

VECTORS = clustered(2000, 32)


@pytest.mark.parametrize(
    ("factory", "dim", "fits"),
    [
        *(("Flat", 32, True), ("IVF8,Flat", 32, True), ("IVF8,SQ8", 32, True)),
        *(("IVF8,PQ16", 32, True), ("IVF8,PQ64", 128, True), ("IVF8,PQ128", 128, False)),
        *(("IVF8,PQ16x4", 32, False), ("IVF8,PQ16x4fs", 32, False), ("IVF8,RaBitQ", 32, False)),
        *(("HNSW16", 32, False), ("RR32,IVF8,SQ8", 32, False)),
    ],
)
def test_gpu_code_takes_plain_kinds_only(factory, dim, fits):
    assert has_gpu_kernels(factory, dim, "l2") is fits


@pytest.mark.parametrize(
    ("factory", "honours"),
    [("Flat", True), ("IVF8,SQ8", True), ("HNSW16", True), ("PQ16x4", False), ("PQ16x4fs", False)],
)
def test_kinds_that_ignore_filters_are_known(factory, honours):
    index = train_template(factory, "l2", VECTORS, seed=0)
    assert honours_selectors(index) is honours


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_everything_stays_where_it_is():
    index = train_template("IVF8,Flat", "l2", VECTORS, seed=0)
    assert to_gpu(index) is index
    assert to_cpu(index) is index
    assert not is_on_gpu(index)
    with train_on_gpu(index, enabled=True):
        assert index.clustering_index is None


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a GPU that FAISS sees")
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,SQ8"])
def test_a_gpu_adds_and_finds_the_same(factory):
    template = Template.of(train_template(factory, "l2", VECTORS, seed=0))
    on_gpu = to_gpu(template.copy(), rows=len(VECTORS))
    on_cpu = template.copy()
    on_gpu.add(VECTORS)
    on_cpu.add(VECTORS)
    assert is_on_gpu(on_gpu)
    assert not honours_selectors(on_gpu)
    found = search_index(on_gpu, VECTORS[:50], 10, effort=8, metric="l2")
    wanted = search_index(on_cpu, VECTORS[:50], 10, effort=8, metric="l2")
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
    back = to_cpu(on_gpu)
    assert back.ntotal == len(VECTORS)
