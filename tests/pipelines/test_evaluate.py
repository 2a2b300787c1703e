"""The evaluate job in this process: what it counts, compares, writes and refuses."""

import json
import logging
import math
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.errors import ConfigError, NoInputError
from qbatch.evaluation.comparison import DRAWS
from qbatch.pipelines.evaluate import EvaluateConfig, evaluate, format_table
from qbatch.storage import Storage

QRELS = """query-id\tcorpus-id\tscore
q1\td1\t2
q1\td2\t0
q2\td5\t1
q3\td1\t1
q4\td1\t0
"""
GOOD = "q1 Q0 d1 1 3 t\nq1 Q0 d2 2 2 t\nq2 Q0 d5 1 1 t\nother Q0 d1 1 1 t\nq4 Q0 d1 1 1 t\n"
POOR = "q1 Q0 d2 1 3 t\nq1 Q0 d1 2 2 t\nq1 Q0 d2 3 1 t\nq2 Q0 d5 1 1 t\n"


@pytest.fixture
def config(store_uri) -> EvaluateConfig:
    storage = Storage(store_uri)
    storage.write("qrels.tsv", QRELS.encode())
    storage.write("good.trec", GOOD.encode())
    storage.write("poor.trec", POOR.encode())
    return EvaluateConfig(
        run=f"{store_uri}/good.trec",
        compare_to=f"{store_uri}/poor.trec",
        qrels=f"{store_uri}/qrels.tsv",
        metrics=("ndcg@10", "recall@1"),
        output=f"{store_uri}/out",
    )


def test_summary_report_and_values_of_queries(config):
    summary = evaluate(config)
    poor = (1 / math.log2(3) + 1) / 4
    assert summary == {
        "qrels": config.qrels,
        "queries": 4,
        "queries_without_relevant": 1,
        "run": config.run,
        "documents": 5,
        "repeated_documents": 0,
        "queries_not_judged": 1,
        "queries_without_documents": 1,
        "metrics": {"ndcg@10": 0.5, "recall@1": 0.5},
        "compared_to": {
            "run": config.compare_to,
            "documents": 3,
            "repeated_documents": 1,
            "queries_not_judged": 0,
            "queries_without_documents": 2,
            "metrics": {"ndcg@10": pytest.approx(poor), "recall@1": 0.25},
        },
        "comparison": {
            "ndcg@10": {
                "difference": pytest.approx(0.5 - poor),
                "p_value": 1.0,
                "wins": 1,
                "ties": 3,
                "losses": 0,
            },
            "recall@1": {"difference": 0.25, "p_value": 1.0, "wins": 1, "ties": 3, "losses": 0},
        },
    }
    storage = Storage(config.output)
    assert json.loads(storage.read("report.json")) == json.loads(json.dumps(summary))
    table = pq.read_table(pa.BufferReader(storage.read("per_query.parquet")))
    assert table.column_names == ["query_id", "metric", "value", "compared_value"]
    recall = table.filter(pa.compute.equal(table["metric"], "recall@1"))
    assert recall["query_id"].to_pylist() == ["q1", "q2", "q3", "q4"]
    assert recall["value"].to_pylist() == [1.0, 1.0, 0.0, 0.0]
    assert recall["compared_value"].to_pylist() == [0.0, 1.0, 0.0, 0.0]


def test_one_run_alone(tmp_path):
    (tmp_path / "run").write_text(GOOD)
    (tmp_path / "qrels").write_text(QRELS)
    output = tmp_path / "out"
    config = EvaluateConfig(
        run=str(tmp_path / "run"), qrels=str(tmp_path / "qrels"), output=str(output)
    )
    summary = evaluate(config)
    assert list(summary["metrics"]) == ["ndcg@10", "recall@100", "mrr@10", "map"]
    assert "comparison" not in summary
    table = pq.read_table(output / "per_query.parquet")
    assert table.column_names == ["query_id", "metric", "value"]
    assert table.num_rows == 4 * 4
    assert evaluate(config) == summary


def test_means_of_the_table_are_those_of_the_summary(config):
    summary = evaluate(config)
    lines = format_table(summary).splitlines()
    assert lines[0].split() == [
        *("metric", "run", "other", "difference", "p", "wins", "ties", "losses")
    ]
    assert lines[2].split() == ["recall@1", "0.5000", "0.2500", "+0.2500", "1.0000", "1", "3", "0"]
    assert len({len(line) for line in lines}) == 1
    del summary["comparison"]
    assert [line.split() for line in format_table(summary).splitlines()] == [
        ["metric", "mean"],
        ["ndcg@10", "0.5000"],
        ["recall@1", "0.5000"],
    ]


def test_what_may_surprise_is_said(tmp_path, caplog):
    (tmp_path / "run").write_text("q1 Q0 d1 1 1 t\nq1 Q0 d2 2 5 t\nx Q0 d 1 1 t\n")
    (tmp_path / "qrels").write_text(QRELS)
    with caplog.at_level(logging.WARNING):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), qrels=str(tmp_path / "qrels")))
    assert "has no documents for 3 judged queries; they count as 0" in caplog.text
    assert "1 queries of" in caplog.text
    assert "rise 1 times where ranks fall; the order is that of the ranks" in caplog.text


def test_a_run_and_judgements_that_do_not_belong_together_are_refused(tmp_path):
    (tmp_path / "run").write_text("1 Q0 d1 1 1 t\n")
    (tmp_path / "qrels").write_text(QRELS)
    with pytest.raises(ConfigError, match=r"the run has '1', the judgements have 'q1'\. Give the"):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), qrels=str(tmp_path / "qrels")))


def test_an_absent_run_is_no_input(tmp_path):
    (tmp_path / "qrels").write_text(QRELS)
    with pytest.raises(NoInputError, match="there is no run at"):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), qrels=str(tmp_path / "qrels")))


def test_the_seed_decides_the_p_value(tmp_path):
    runs = {"run": [], "other": []}
    qrels = []
    for i in range(60):
        qrels.append(f"q{i} 0 good 1\n")
        runs["run"].append(f"q{i} Q0 {'good' if i % 5 else 'bad'} 1 1 t\n")
        runs["other"].append(f"q{i} Q0 {'bad' if i % 3 else 'good'} 1 1 t\n")
    for name, lines in [*runs.items(), ("qrels", qrels)]:
        (tmp_path / name).write_text("".join(lines))
    places = {"run": str(tmp_path / "run"), "qrels": str(tmp_path / "qrels")}
    found = [
        evaluate(EvaluateConfig(**places, compare_to=str(tmp_path / "other"), seed=seed))
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    p_value = found[0]["comparison"]["map"]["p_value"]
    assert 1 / (DRAWS + 1) <= p_value < 0.01
    assert found[2]["comparison"]["map"]["difference"] == pytest.approx(48 / 60 - 20 / 60)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"metrics": ("ndcg@ten",)}, "unknown metric 'ndcg@ten'"),
        ({"metrics": ()}, "no metric"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(flags, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(run="nowhere", qrels="nowhere", **flags)


def test_flags():
    names = [field.name for field in fields(EvaluateConfig)]
    assert names == [
        *("run", "qrels", "metrics", "compare_to", "split", "seed", "output"),
        *("model", "datasets", "revision", "dim", "reranker", "reranker_revision"),
        *("rerank_depth", "instruction", "instructions", "dtype", "weights"),
    ]
