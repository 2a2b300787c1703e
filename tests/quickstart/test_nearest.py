"""The quickstart's search against known neighbours, with the real small model."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbatch.errors import NoInputError
from qbatch.manifest import Generation, file_entry, publish
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.quickstart.nearest import Hit, format_hits, nearest
from qbatch.schema import FILES, vector_array
from qbatch.storage import Storage
from tests import assets

TEXTS = {
    "oasis": "a fertile place with water in the desert",
    "glacier": "a slowly moving mass of ice",
    "sonnet": "a poem of fourteen lines",
}


@pytest.fixture(scope="module")
def vectors_uri(tmp_path_factory):
    """A published vectors table; the sonnet has two passages."""
    doc_ids = [*TEXTS, "sonnet"]
    tokens = TextTokenizer.load(assets.minilm()).encode([*TEXTS.values(), "rhymes and verses"])
    embedder = EmbedderConfig(model_path=assets.minilm()).build()
    vectors = vector_array(embedder.embed(tokens.ids, tokens.lengths))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"doc_id": doc_ids, "vector": vectors}), sink)
    data = sink.getvalue().to_pybytes()
    storage = Storage(str(tmp_path_factory.mktemp("vectors")))
    storage.write("data/a.parquet", data)
    entry = file_entry("data/a.parquet", len(doc_ids), data)
    draft = Generation(
        kind="vectors",
        fingerprint={},
        config={},
        counts={},
        files=pa.Table.from_pylist([entry], schema=FILES),
        rejects=FILES.empty_table(),
    )
    publish(storage, draft, after=0)
    return storage.uri


def test_nearest_finds_each_document_once_best_first(vectors_uri):
    queries = ["where do travellers drink?", "ice on a mountain", "verse by Shakespeare"]
    hits = nearest(vectors_uri, str(assets.minilm()), queries, top_k=3)
    assert [found[0].doc_id for found in hits] == ["oasis", "glacier", "sonnet"]
    for found in hits:
        assert {hit.doc_id for hit in found} == set(TEXTS)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_nearest_says_when_nothing_is_published(tmp_path):
    with pytest.raises(NoInputError, match="no published generation"):
        nearest(str(tmp_path), "unused", ["query"])


def test_format_hits_fits_the_terminal():
    hits = [[Hit(doc_id="a", score=0.5), Hit(doc_id="unknown", score=-0.25)]]
    documents = {"a": {"title": "A very long title that goes on and on", "text": "word " * 99}}
    lines = format_hits(["why?"], hits, documents, width=80).splitlines()
    assert lines[0] == "why?"
    assert lines[1].startswith("   0.50  A very long title that")
    assert lines[1].endswith("...")
    assert lines[2] == "  -0.25  unknown"
    assert max(map(len, lines)) <= 80
