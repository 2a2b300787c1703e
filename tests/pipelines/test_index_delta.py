"""Nights of an index: changed rows in shards of their own, against indexes built from scratch."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from qbatch.index.stored import stored_shards
from qbatch.manifest import load_generation
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.precompute import PrecomputeConfig, precompute
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.storage import Storage
from qbatch.tables import open_table, open_vectors
from tests.vector_tables import clustered, rows_table, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_FILES, ROWS_PER_FILE, DIM = 12, 100, 16
Rows = list[tuple[str, np.ndarray, str]]
"""Document, vector, language."""


class Corpus:
    """Files of rows that change from night to night."""

    def __init__(self, uri: str, seed: int = 0) -> None:
        self.uri = uri
        self.rng = np.random.default_rng(seed)
        vectors = clustered(NUM_FILES * ROWS_PER_FILE, DIM)
        rows = [(f"d{i}", vector, "en" if i % 3 else "de") for i, vector in enumerate(vectors)]
        self.files: dict[str, Rows] = {
            f"f{i:02}": rows[i * ROWS_PER_FILE : (i + 1) * ROWS_PER_FILE] for i in range(NUM_FILES)
        }
        self.num_new = len(rows)

    def publish(self, uri: str | None = None) -> None:
        files = {}
        for name, rows in self.files.items():
            ids = [row[0] for row in rows]
            table = rows_table(
                np.array([row[1] for row in rows]), ids, {"lang": [r[2] for r in rows]}
            )
            passages = pa.array([f"{doc_id}#0" for doc_id in ids], pa.large_string())
            files[name] = table.set_column(1, "passage_id", passages)
        write_vectors(uri or self.uri, files)

    def vector(self) -> np.ndarray:
        vector = self.rng.standard_normal(DIM)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def night(self) -> None:
        """Edit, insert, delete, repeat and move some rows; rename a file."""
        names = list(self.files)
        for name in self.rng.choice(names, 3, replace=False):
            rows = self.files[name]
            place = int(self.rng.integers(len(rows) - 4))
            rows[place] = (rows[place][0], self.vector(), rows[place][2])
            del rows[place + 1]
            self.num_new += 1
            rows.insert(place, (f"d{self.num_new}", self.vector(), "fr"))
            rows.append(rows[place + 2])
        first, second = self.rng.choice(names, 2, replace=False)
        self.files[second].extend(self.files[first][:10])
        del self.files[first][:10]
        self.files[f"renamed{self.num_new}"] = self.files.pop(str(self.rng.choice(names)))


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    corpus = Corpus(f"{tmp_path}/vectors")
    corpus.publish()
    return corpus


@pytest.fixture
def config(tmp_path, corpus) -> BuildIndexConfig:
    return BuildIndexConfig(
        vectors=corpus.uri,
        output=f"{tmp_path}/index",
        factory="IVF8,Flat",
        num_shards=4,
        num_probes=60,
        max_delta_share=0.3,
    )


def found(index: str, queries: str, output: str, **options) -> dict[str, list[tuple[str, float]]]:
    settings = {"top_k": 10, "nprobe": 8, **options}
    config = SearchIndexConfig(
        index=index, queries=queries, output=output, id_column="q", vector_column="v", **settings
    )
    search_index(config)
    hits: dict[str, list[tuple[str, float]]] = {}
    for row in open_table(output).to_table().to_pylist():
        hits.setdefault(row["query_id"], []).append((row["doc_id"], row["score"]))
    return hits


def write_queries(uri: str, rows: int = 50) -> str:
    vectors = clustered(rows, DIM, seed=9)
    table = pa.table({"q": [f"q{i}" for i in range(rows)], "v": pa.array(vectors.tolist())})
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    Storage(uri).write("queries.parquet", sink.getvalue().to_pybytes())
    return f"{uri}/queries.parquet"


def assert_same(left: dict, right: dict) -> None:
    """Equal scores, and equal documents where scores do not tie."""
    assert left.keys() == right.keys()
    for query, hits in left.items():
        wanted = right[query]
        scores = [score for _, score in hits]
        np.testing.assert_allclose(scores, [score for _, score in wanted], atol=1e-6)
        cut = wanted[-1][1] + 1e-6
        assert {d for d, s in hits if s > cut} == {d for d, s in wanted if s > cut}


def test_nights_equal_indexes_from_scratch(config, corpus, tmp_path):
    queries = write_queries(str(tmp_path))
    first = build_index(config)
    assert first["delta"] == {"rows": 0, "dead": 0, "share": 0.0}
    for night, options in enumerate([{"filter": 'lang == "de"'}, {"rescore": 2}]):
        corpus.night()
        corpus.publish()
        summary = build_index(config)
        assert summary["shards_made"] == 1, "only the new rows are built"
        assert summary["num_shards"] == 4 + night + 1
        assert 0 < summary["delta"]["dead"] < summary["delta"]["rows"] < 60
        assert summary["ntotal"] == sum(map(len, corpus.files.values()))
        scratch = replace(config, output=f"{tmp_path}/scratch{night}", max_delta_share=0.0)
        build_index(scratch)
        for i, chosen in enumerate(({}, options)):
            name = f"{tmp_path}/{night}-{i}"
            assert_same(
                found(config.output, queries, f"{name}-delta", **chosen),
                found(scratch.output, queries, f"{name}-scratch", **chosen),
            )
    again = build_index(config)
    assert (again["generation"], again["shards_made"]) == (3, 0)


def test_too_many_changes_build_shards_anew(config, corpus):
    build_index(config)
    corpus.night()
    corpus.publish()
    assert build_index(config)["delta"]["share"] > 0.001
    summary = build_index(replace(config, max_delta_share=0.001))
    assert summary["delta"] == {"rows": 0, "dead": 0, "share": 0.0}
    assert summary["num_shards"] == 4
    rows = sum(shard.rows for shard in stored_shards(*index_at(config.output)))
    assert rows == summary["ntotal"] == sum(map(len, corpus.files.values()))


def index_at(uri: str):
    table = open_table(uri)
    return table.storage, table.generation


def test_deletions_alone_build_nothing(config, corpus):
    build_index(config)
    corpus.files["f00"] = corpus.files["f00"][:50]
    del corpus.files["f01"]
    corpus.publish()
    summary = build_index(config)
    assert (summary["shards_made"], summary["num_shards"]) == (0, 4)
    assert summary["delta"]["dead"] == 150
    assert summary["ntotal"] == (NUM_FILES - 1) * ROWS_PER_FILE - 50


def test_moved_rows_are_no_change(config, corpus):
    build_index(config)
    rows = [row for file in corpus.files.values() for row in file]
    corpus.rng.shuffle(rows)
    corpus.files = {f"g{i}": rows[i::7] for i in range(7)}
    corpus.publish()
    summary = build_index(config)
    assert (summary["shards_made"], summary["delta"]["share"]) == (0, 0.0)
    assert summary["generation"] == 2, "it says which vectors it stands for"


def test_unknown_vectors_build_shards_anew(config, corpus):
    build_index(config)
    corpus.night()
    corpus.publish()
    for info in list(Storage(corpus.uri).iter_objects("manifests")):
        if info.path.endswith("00000001.json"):
            Storage(corpus.uri).delete(info.path)
    summary = build_index(config)
    assert summary["delta"]["rows"] == 0
    assert summary["shards_made"] > 1


@pytest.mark.slow
def test_a_template_that_no_longer_fits_is_trained_again(config, corpus):
    """Vectors of eight directions, then of eight others: one-byte codes know only what they saw."""
    axes = np.eye(DIM, dtype=np.float32)

    def fill(first: int) -> None:
        for i, name in enumerate(list(corpus.files)):
            noise = 0.2 * corpus.rng.standard_normal((ROWS_PER_FILE, DIM)).astype(np.float32)
            near = axes[first + np.arange(ROWS_PER_FILE) % 8] + noise * axes[first : first + 8].sum(
                0
            )
            unit = near / np.linalg.norm(near, axis=1, keepdims=True)
            ids = [f"{i}-{j}" for j in range(ROWS_PER_FILE)]
            corpus.files[name] = [(d, vector, "en") for d, vector in zip(ids, unit, strict=True)]
        corpus.publish()

    config = replace(config, factory="IVF8,PQ8x8", target_recall=0.5)
    fill(0)
    first = build_index(config)
    fill(8)
    second = build_index(config)
    trained = [
        load_generation(Storage(config.output), number).details["training"]["template"]
        for number in (first["generation"], second["generation"])
    ]
    assert trained[0] != trained[1]
    assert second["recall"]["10"] >= 0.5
    assert second["num_shards"] == second["shards_made"] == 4


@pytest.mark.slow
def test_related_documents_after_nights_are_those_of_a_fresh_index(config, corpus, tmp_path):
    config = replace(config, factory="Flat")
    build_index(config)
    for _ in range(2):
        corpus.night()
        corpus.publish()
        build_index(config)
    scratch = replace(config, output=f"{tmp_path}/scratch", max_delta_share=0.0)
    build_index(scratch)
    assert (
        open_vectors(corpus.uri).num_rows == open_table(config.output).generation.counts["ntotal"]
    )
    tables = []
    for index in (config.output, scratch.output):
        related = PrecomputeConfig(
            index=index,
            output=f"{index}-related",
            mode="items",
            top_k=5,
            same="lang",
            diversity=0.2,
            num_partitions=2,
        )
        precompute(related)
        rows = open_table(related.output).to_table().to_pylist()
        tables.append({r["key"]: [(i["doc_id"], i["score"]) for i in r["items"]] for r in rows})
    assert tables[0].keys() == tables[1].keys()
    for key, items in tables[0].items():
        np.testing.assert_allclose(
            [score for _, score in items], [score for _, score in tables[1][key]], atol=1e-6
        )
