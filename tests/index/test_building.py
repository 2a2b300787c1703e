"""A shard's builder against one index filled at once and a sort of everything."""

import numpy as np
import pyarrow as pa
import pytest

from qbatch.index.building import ShardBuilder, list_facts
from qbatch.index.columns import VectorColumn
from qbatch.index.probes import ProbeResults, Probes
from qbatch.index.recall import TUNED_DEPTH
from qbatch.index.training import Template, train_template
from tests.vector_tables import FINGERPRINT, clustered, rows_table

ROWS, DIM = 900, 16
VECTORS = clustered(ROWS, DIM)
DOC_IDS = [f"d{i // 3}" for i in range(ROWS)]
COLUMN = VectorColumn.of(FINGERPRINT | {"dims": [DIM]})
PROBE_ROWS = np.array([5, 4, 300, 899])


def build(factory="IVF8,Flat", doc_ids=None, **changes):
    template = Template.of(train_template(factory, "l2", VECTORS, seed=0))
    if doc_ids is None:
        doc_ids = [DOC_IDS[i] for i in PROBE_ROWS]
    probes = Probes(vectors=VECTORS[PROBE_ROWS], doc_ids=pa.array(doc_ids, pa.large_string()))
    builder = ShardBuilder(
        template, COLUMN, probes, num_rows=ROWS, **{"target_recall": 0.95, **changes}
    )
    table = rows_table(VECTORS, DOC_IDS, {"lang": ["en"] * ROWS}).drop_columns(["passage_index"])
    for start, stop in ((0, 1), (1, 400), (400, 400), (400, ROWS)):
        builder.add(table.slice(start, stop - start))
    return builder.finish()


def test_streamed_parts_make_the_index_of_the_whole():
    built = build()
    whole = train_template("IVF8,Flat", "l2", VECTORS, seed=0)
    whole.add(VECTORS)
    assert Template.of(built.index).sha256 == Template.of(whole).sha256
    assert built.ids.column_names == ["doc_id", "passage_id", "content_hash", "lang"]
    assert built.ids["doc_id"].to_pylist() == DOC_IDS
    assert (built.facts["rows"], built.facts["documents"]) == (ROWS, ROWS // 3)
    assert built.facts["lists"]["largest"] >= ROWS / 8


def test_probes_find_every_document_but_their_own():
    exact = build().probes.exact
    scores = VECTORS[PROBE_ROWS] @ VECTORS.T
    for line, probe in enumerate(PROBE_ROWS.tolist()):
        others = np.array([DOC_IDS[i] != DOC_IDS[probe] for i in range(ROWS)])
        wanted = np.argsort(np.where(others, -scores[line], np.inf), kind="stable")[:100]
        np.testing.assert_array_equal(exact.rows[line, :100], wanted)


def test_real_queries_have_no_document_of_their_own():
    exact = build(doc_ids=[None] * 4).probes.exact
    np.testing.assert_array_equal(exact.rows[:, 0], PROBE_ROWS)


def test_the_sweep_ends_when_the_target_is_well_reached():
    probes = build(target_recall=0.5).probes
    assert 0 < len(probes.found) < 8
    assert list(probes.found) == sorted(probes.found)
    everything = build(target_recall=1.0).probes
    found, exact = everything.at(8).rows, everything.exact.rows
    np.testing.assert_array_equal(found[:, :TUNED_DEPTH], exact[:, :TUNED_DEPTH])


def test_results_survive_storage():
    probes = build().probes
    again = ProbeResults.from_table(probes.to_table())
    np.testing.assert_array_equal(again.exact.rows, probes.exact.rows)
    assert again.found.keys() == probes.found.keys()
    for effort, found in probes.found.items():
        np.testing.assert_array_equal(again.found[effort].rows, found.rows)
        np.testing.assert_array_equal(again.found[effort].scores, found.scores)
    assert again.seconds == pytest.approx(probes.seconds)
    assert again.at(10**6).rows.shape == probes.exact.rows.shape


def test_list_facts_tell_imbalance():
    even = train_template("IVF8,Flat", "l2", VECTORS, seed=0)
    even.add(VECTORS)
    one_sided = train_template("IVF8,Flat", "l2", VECTORS, seed=0)
    one_sided.add(np.repeat(VECTORS[:1], 100, axis=0))
    assert list_facts(one_sided)["imbalance"] == 8
    assert list_facts(even)["imbalance"] < 3
    assert list_facts(train_template("Flat", "l2", VECTORS, seed=0)) == {}
