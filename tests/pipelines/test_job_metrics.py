"""What Prometheus would scrape of a job is what the job's summary says."""

import json
import re
import time
import urllib.request
from collections.abc import Callable

import pytest
import ray

from qbatch.pipelines import metrics
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from tests.processes import ROOT

DASHBOARD = ROOT / "k8s" / "components" / "monitoring" / "dashboard.json"

LONGEST_WAIT_S = 60


def scrape(name: str, **labels: str) -> dict[str, float]:
    """Return the samples of a metric by their labels as text, those with all given labels."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    samples = [line.rpartition(" ") for line in lines if line.startswith(f"{name}{{")]
    return {head: float(value) for head, _, value in samples if all(w in head for w in wanted)}


def total(name: str, **labels: str) -> float:
    return sum(scrape(name, **labels).values())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the metric did not arrive"
        time.sleep(0.5)


def test_the_dashboard_draws_what_jobs_count():
    text = DASHBOARD.read_text()
    names = {name for name, _ in metrics._COUNTED.values()}
    names |= {"qbatch_units", "qbatch_units_waiting", "qbatch_packs"}
    names |= {"qbatch_rejected", "qbatch_stage_seconds"}
    drawn = set(re.findall(r"ray_(qbatch_\w+?)(?:_total|\{)", text))
    assert drawn <= names
    assert len(drawn) > 5
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_scraped_counters_are_those_of_the_summary(tmp_path, tiny_model):
    rows = [{"doc_id": str(i), "text": f"text {i}"} for i in range(40)] + [{"doc_id": "empty"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EmbedCorpusConfig(
        input=str(tmp_path / "corpus.jsonl"),
        output=str(tmp_path / "out"),
        model=tiny_model,
        dtype="float32",
        max_bad_fraction=0.1,
    )
    counters = ("rows", "passages", "tokens", "units", "rejected")
    before = {name: total(f"ray_qbatch_{name}_total", job="embed") for name in counters}
    summary = embed_corpus(config)
    expected = {
        "rows": summary["rows_in"],
        "passages": summary["passages"],
        "tokens": summary["tokens"],
        "units": summary["units_made"],
        "rejected": sum(summary["rejected"].values()),
    }

    def added() -> dict[str, float]:
        return {n: total(f"ray_qbatch_{n}_total", job="embed") - before[n] for n in counters}

    wait_for(lambda: added()["rows"] >= summary["rows_in"])
    assert added() == expected
    assert summary["rejected"] == {"null_text": 1}
    assert total("ray_qbatch_packs_total", job="embed") > 0
    assert total("ray_qbatch_units_waiting", job="embed") == 0
    assert total("ray_qbatch_rejected_total", job="embed", reason="null_text") >= 1
    assert total("ray_qbatch_stage_seconds_total", job="embed", stage="forward") > 0
