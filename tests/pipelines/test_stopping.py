"""What a job does around the stop of Ray."""

import json
import time
from contextlib import contextmanager

import pytest

from qbatch.pipelines import embed, rerank
from qbatch.pipelines.cluster import ray_session
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from tests.candidate_tables import make_candidates, write_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def embed_job(tmp_path, tiny_model):
    (tmp_path / "a.jsonl").write_text(json.dumps({"doc_id": "a", "text": "one"}) + "\n")
    config = EmbedCorpusConfig(
        input=f"{tmp_path}/a.jsonl", output=f"{tmp_path}/out", model=tiny_model, dtype="float32"
    )
    return embed, lambda: embed_corpus(config)


@pytest.fixture
def rerank_job(tmp_path, tiny_reranker):
    made = make_candidates(num_queries=2, num_candidates=3, num_documents=5)
    config = RerankCandidatesConfig(
        **write_run(str(tmp_path), made),
        output=f"{tmp_path}/out",
        model=tiny_reranker,
        dtype="float32",
        num_partitions=1,
    )
    return rerank, lambda: rerank_candidates(config)


@pytest.mark.parametrize("name", ["embed_job", "rerank_job"])
def test_nothing_is_published_before_ray_has_stopped(name, request, monkeypatch):
    """Whatever runs beside its stop may free one of its objects, and that ends the process."""
    module, job = request.getfixturevalue(name)
    events, publish_change = [], module.publish_change

    @contextmanager
    def slow_to_stop(**settings):
        with ray_session(**settings):
            yield
        time.sleep(1)
        events.append("stopped")

    def publish(*arguments):
        events.append("published")
        return publish_change(*arguments)

    monkeypatch.setattr(module, "ray_session", slow_to_stop)
    monkeypatch.setattr(module, "publish_change", publish)
    job()
    assert events == ["stopped", "published"]
