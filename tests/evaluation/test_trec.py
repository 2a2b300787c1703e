"""A run written as TREC is the run that is read back, here and by trec_eval's own reader."""

import io

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from pytrec_eval import parse_run

from qbatch.errors import BadInputError
from qbatch.evaluation import trec
from qbatch.evaluation.reading import read_run
from qbatch.evaluation.trec import write_trec
from qbatch.schema import RUN

ids = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=" \t\n\v\f\r\ufeff"),
    min_size=1,
    max_size=8,
)
float32s = st.floats(width=32, allow_nan=False)
runs = st.dictionaries(
    ids, st.lists(st.tuples(ids, float32s), min_size=1, unique_by=lambda r: r[0]), min_size=1
)


def as_table(rankings) -> pa.Table:
    rows = [
        {"query_id": q, "doc_id": d, "passage_id": f"{d}#0", "rank": rank, "score": score}
        for q, found in sorted(rankings.items(), key=lambda item: item[0].encode())
        for rank, (d, score) in enumerate(found, 1)
    ]
    return pa.Table.from_pylist(rows, schema=RUN)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs)
def test_what_is_written_is_read_back(tmp_path, rankings):
    run = as_table(rankings)
    with (tmp_path / "run.trec").open("wb") as file:
        assert write_trec(run, file) == len(run)
    assert read_run(str(tmp_path / "run.trec")).equals(run.drop_columns("passage_id"))


def test_lines(monkeypatch):
    monkeypatch.setattr(trec, "_BATCH_ROWS", 2)
    run = as_table({"q1": [("d2", 0.1), ("d1", 1e-7), ("d2", 0.0)], "q0": [("d9", 2.0)]})
    shuffled = run.take(pa.array(np.random.default_rng(0).permutation(len(run))))
    file = io.BytesIO()
    assert write_trec(shuffled, file, tag="mine") == 3
    text = file.getvalue().decode()
    assert text == "q0 Q0 d9 1 2 mine\nq1 Q0 d2 1 0.1 mine\nq1 Q0 d1 2 1e-7 mine\n"
    assert parse_run(text.splitlines()) == {"q0": {"d9": 2.0}, "q1": {"d2": 0.1, "d1": 1e-7}}


@pytest.mark.parametrize("bad", ["a b", "a\tb", "a\n", "", "a\vb"])
def test_what_trec_cannot_express_is_refused(bad):
    for rankings, name in (({bad: [("d", 1.0)]}, "query_id"), ({"q": [(bad, 1.0)]}, "doc_id")):
        with pytest.raises(BadInputError, match=f"{name} .* is empty or holds whitespace"):
            write_trec(as_table(rankings), io.BytesIO())
    with pytest.raises(BadInputError, match=r"tag .* is empty or holds whitespace"):
        write_trec(as_table({"q": [("d", 1.0)]}), io.BytesIO(), tag=bad)


def test_a_run_without_scores_is_refused():
    run = as_table({"q": [("d", 1.0)]}).drop_columns("score")
    with pytest.raises(BadInputError, match="needs scores, this one has ranks only"):
        write_trec(run, io.BytesIO())
