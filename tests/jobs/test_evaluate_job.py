"""The evaluate job as users start it: flags, streams and exit codes."""

import json

import pytest

from tests.processes import Job

QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    (tmp_path / "beir" / "qrels" / "dev.tsv").write_text(QRELS)
    (tmp_path / "run.trec").write_text("q1 Q0 d1 1 0.9 a\nq2 Q0 d9 1 0.8 a\nq2 Q0 d2 2 0.7 a\n")
    (tmp_path / "other.trec").write_text("q1 Q0 d1 1 0.9 b\n")
    return tmp_path


def run_job(place, **flags) -> tuple[int, dict | None, str]:
    job = Job("evaluate.py", flags, place / "log")
    code, summary = job.wait()
    return code, summary, job.log()


def test_flags_streams_and_files(place):
    code, summary, log = run_job(
        place, run=place / "run.trec", qrels=place / "beir", split="dev", metrics="mrr@10,p@1",
        compare_to=place / "other.trec", seed=7, output=place / "out",
    )  # fmt: skip
    assert code == 0, log
    assert summary["metrics"] == {"mrr@10": 0.75, "precision@1": 0.5}
    assert summary["comparison"]["mrr@10"] == {
        "difference": 0.25, "p_value": 1.0, "wins": 1, "ties": 1, "losses": 0,
    }  # fmt: skip
    assert "mrr@10       0.7500  0.5000     +0.2500  1.0000     1     1       0" in log
    assert json.loads((place / "out" / "report.json").read_text()) == summary
    assert (place / "out" / "per_query.parquet").exists()


def test_exit_codes(place):
    places = {"run": place / "run.trec", "qrels": place / "beir/qrels/dev.tsv"}
    assert run_job(place, **places | {"metrics": "bleu"})[:2] == (2, None)
    assert run_job(place, **places | {"run": place / "absent"})[:2] == (3, None)
    (place / "broken.trec").write_text("q1 Q0 d1 1 0.9 a\nq1 Q0 d2 2\n")
    code, summary, log = run_job(place, **places | {"run": place / "broken.trec"})
    assert (code, summary) == (4, None)
    assert "broken.trec line 2: 4 fields where 6 are expected" in log
    assert "unknown metric 'bleu'; use ndcg" in log
