import pytest

from qbatch.errors import ConfigError
from qbatch.index.choosing import choose_factory, codec_recall, index_bytes, lists_for
from qbatch.index.factory import make_index
from tests.vector_tables import clustered

GIB = 2**30
SAMPLE = clustered(8000, 64, clusters=400)


def choice(**changes):
    settings = {
        "ntotal": 1_000_000,
        "metric": "l2",
        "budget_bytes": 4 * GIB,
        "target_recall": 0.95,
    } | changes
    return choose_factory(SAMPLE, **settings)


def test_few_vectors_are_compared_with_all():
    found = choice(ntotal=5000)
    assert found.factory == "Flat"
    assert "exact" in found.reason


def test_lists_grow_with_the_square_root():
    assert [lists_for(n) for n in (10_000, 1_000_000, 100_000_000)] == [512, 4096, 32_768]
    assert choice(ntotal=500_000_000, budget_bytes=400 * GIB).factory.startswith("IVF65536_HNSW32,")


def test_the_cheapest_codec_that_is_good_enough_is_taken():
    assert codec_recall("SQ8", SAMPLE, "l2") > codec_recall("SQ4", SAMPLE, "l2")
    assert choice().factory == "IVF4096,SQ8"
    strict = choice(target_recall=0.999)
    assert strict.factory in {"IVF4096,SQfp16", "IVF4096,Flat"}
    assert "of 4.0 GiB" in strict.reason


def test_a_tight_budget_takes_a_smaller_codec_or_refuses():
    needed = index_bytes(make_index("IVF4096,SQ8", 64, "l2"), 1_000_000)
    tight = choice(budget_bytes=needed - 1, target_recall=0.6)
    assert tight.factory in {"IVF4096,SQ6", "IVF4096,SQ4"}
    with pytest.raises(ConfigError, match=r"no factory fits .* --memory-budget-gib"):
        choice(budget_bytes=needed - 1, target_recall=0.9999)
    with pytest.raises(ConfigError, match="the smallest codec, SQ4, is too large"):
        choice(budget_bytes=1000)
