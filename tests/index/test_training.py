import faiss
import numpy as np
import pytest

from qbatch.errors import ConfigError
from qbatch.index.factory import make_index
from qbatch.index.training import Template, num_training_rows, train_template
from tests.vector_tables import clustered


def test_the_same_sample_and_seed_give_the_same_bytes():
    sample = clustered(3000, 32)
    first = Template.of(train_template("IVF16,SQ8", "l2", sample, seed=3))
    again = Template.of(train_template("IVF16,SQ8", "l2", sample, seed=3))
    other = Template.of(train_template("IVF16,SQ8", "l2", sample, seed=4))
    assert first.sha256 == again.sha256 != other.sha256


def test_copies_are_trained_empty_and_independent():
    template = Template.of(train_template("IVF16,SQ8", "l2", clustered(3000, 32), seed=0))
    one, two = template.copy(), template.copy()
    one.add(clustered(10, 32))
    assert (one.ntotal, two.ntotal) == (10, 0)
    assert two.is_trained
    assert faiss.serialize_index(two).tobytes() == template.data


def test_repeated_vectors_count_once():
    sample = clustered(2000, 16)
    boilerplate = np.repeat(sample[:1], 5000, axis=0)
    plain = train_template("IVF8,Flat", "l2", sample, seed=0)
    swamped = train_template("IVF8,Flat", "l2", np.concatenate([sample, boilerplate]), seed=0)
    assert Template.of(plain).sha256 == Template.of(swamped).sha256


def test_what_needs_no_training_needs_no_sample():
    assert num_training_rows("Flat", 16, "l2") == 0
    assert num_training_rows("HNSW32", 16, "l2") == 0
    assert num_training_rows("IVF1024,Flat", 16, "l2") == 1024 * 128
    assert num_training_rows("SQ8", 16, "l2") > 0
    assert train_template("Flat", "l2", np.empty((0, 16), np.float32), seed=0).is_trained


def test_more_lists_than_vectors_are_refused():
    with pytest.raises(ConfigError, match="64 lists, but there are only 50 distinct"):
        train_template("IVF64,Flat", "l2", clustered(50, 16), seed=0)


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_lists_lie_as_near_as_those_of_faiss(metric):
    sample = clustered(20_000, 32, clusters=300)
    ours = train_template("IVF128,Flat", metric, sample, seed=0)
    theirs = make_index("IVF128,Flat", 32, metric)
    theirs.cp.max_points_per_centroid = len(sample)
    theirs.train(sample)
    found = [i.quantizer.search(sample, 1)[0].mean() for i in (ours, theirs)]
    assert ours.quantizer.ntotal == 128
    assert found[0] == pytest.approx(found[1], rel=0.01)
