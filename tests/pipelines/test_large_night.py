"""Nights over a corpus of some size: one percent changes, and ten nights in a row.

QBATCH_NIGHT_DOCUMENTS makes the first one smaller, to try it out.
"""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from qbatch.index.stored import stored_shards
from qbatch.pipelines.reindex import AnswersStep, IndexStep, ReindexConfig, RelatedStep, reindex
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.pipelines.vacuum import VacuumConfig, vacuum
from qbatch.reader import IndexReader
from qbatch.release import Release, open_release
from qbatch.schema import vector_matrix
from qbatch.storage import Storage
from qbatch.tables import open_table
from tests.nights import Corpus, indexed_documents, night_config
from tests.tiny_models import write_modules, write_tiny_encoder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("ray_cluster"),
]

NUM_DOCUMENTS = int(os.environ.get("QBATCH_NIGHT_DOCUMENTS", "200000"))
NUM_FILES, NUM_QUERIES = 40, 300
NUM_LISTS = 2 ** round(np.log2(np.sqrt(NUM_DOCUMENTS)))

NIGHTS, NIGHT_DOCUMENTS, NIGHT_FILES, NIGHT_LISTS = 10, 4000, 20, 64
TARGET_RECALL = 0.95
MAX_DELTA_SHARE = 0.1

Hits = dict[str, list[tuple[str, float]]]


@pytest.fixture(scope="module")
def unit_model(tmp_path_factory) -> str:
    """The tiny encoder with vectors of unit length, as real ones have them."""
    path = write_tiny_encoder(tmp_path_factory.mktemp("unit-model"))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    write_modules(path, pooling, ("Normalize",))
    return str(path)


class ChangingCorpus(Corpus):
    """Texts around some topics, each text once; they change at random places."""

    def __init__(self, uri: str, num_documents: int, num_files: int, long_every: int = 0) -> None:
        super().__init__(uri, num_files, 0)
        self.rng = random.Random(0)
        self.long_every = long_every
        self.num_texts = 0
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.topics = [
            ["".join(self.rng.choices(own, k=4)) for _ in range(20)]
            for own in (self.rng.sample(letters, 5) for _ in range(60))
        ]
        names = sorted(self.files)
        for i in range(num_documents):
            self.files[names[i * num_files // num_documents]][f"d{i}"] = self.text()

    def text(self) -> str:
        """Return a text that was never there; some are long enough for several passages."""
        self.num_texts += 1
        is_long = self.long_every and self.num_texts % self.long_every == 0
        topic, others = self.rng.sample(self.topics, 2)
        words = self.rng.choices(topic, k=60 if is_long else 6) + self.rng.choices(others, k=2)
        return f"{' '.join(words)} {self.num_texts}"

    def change(self, share: float) -> set[str]:
        """Edit, insert and delete a share of the documents; return those with a new text."""
        places = [(name, doc_id) for name, rows in self.files.items() for doc_id in rows]
        new = set()
        for i, (name, doc_id) in enumerate(self.rng.sample(places, round(share * len(places)))):
            if i % 4 == 3:
                del self.files[name][doc_id]
            elif i % 4 == 2:
                text = self.text()
                inserted = f"n{self.num_texts}"
                self.files[name] = {inserted: text, **self.files[name]}
                new.add(inserted)
            else:
                self.files[name][doc_id] = self.text()
                new.add(doc_id)
        return new

    def rename_a_file(self) -> None:
        name = self.rng.choice(sorted(self.files))
        self.files[f"renamed-{self.num_texts}.jsonl"] = self.files.pop(name)

    def rewrite_a_file(self) -> None:
        """Keep the rows of a file, in another order."""
        name = self.rng.choice(sorted(self.files))
        self.files[name] = dict(reversed(self.files[name].items()))

    def write_queries(self, uri: str, name: str, num_queries: int) -> None:
        rows = [{"query_id": f"q{i}", "text": self.text()} for i in range(num_queries)]
        Storage(uri).write(name, "\n".join(map(json.dumps, rows)).encode())


def large_config(uri: str, model: str, unit_bytes: int, index: IndexStep) -> ReindexConfig:
    """Return a night of vectors, index and answers; every list is probed for the answers."""
    config = night_config(uri, model, related=RelatedStep())
    lists = int(index.factory.partition(",")[0].removeprefix("IVF"))
    return replace(
        config,
        embed=replace(config.embed, max_tokens=64, unit_bytes=unit_bytes),
        index=index,
        answers=AnswersStep(
            queries=f"{uri}/queries.jsonl", top_k=10, nprobe=lists, num_partitions=2
        ),
    )


def sorted_vectors(release: Release) -> pa.Table:
    """Return all rows of the vectors table by passage, objects as plain strings."""
    table = release.open("vectors").to_table()
    table = table.set_column(0, "object_uri", table["object_uri"].cast(pa.string()))
    return table.take(pc.sort_indices(table["passage_id"])).combine_chunks()


def assert_same_vectors(left: Release, right: Release) -> None:
    found, wanted = sorted_vectors(left), sorted_vectors(right)
    assert found.schema.equals(wanted.schema)
    assert pc.count_distinct(found["passage_id"]).as_py() == len(found)
    for name in wanted.column_names:
        if name == "vector":
            np.testing.assert_allclose(
                vector_matrix(found[name]), vector_matrix(wanted[name]), rtol=0, atol=1e-6
            )
        else:
            assert found[name].equals(wanted[name]), name


def assert_same_hits(left: Hits, right: Hits) -> None:
    """Equal scores, and equal documents but for those that tie with the last."""
    assert left.keys() == right.keys()
    for key, hits in left.items():
        wanted = right[key]
        scores = [score for _, score in wanted]
        np.testing.assert_allclose([score for _, score in hits], scores, rtol=0, atol=1e-5)
        for some, others in ((hits, wanted), (wanted, hits)):
            known = {doc_id for doc_id, _ in others}
            assert {d for d, score in some if score > scores[-1] + 2e-5} <= known, key


def found(release: Release, queries: str, output: str) -> Hits:
    """Search the index of a release with every list probed."""
    index = release.tables["index"]
    search_index(
        SearchIndexConfig(
            index=f"{release.storage.uri}/{index.path}",
            index_generation=index.generation,
            queries=queries,
            output=output,
            top_k=10,
            nprobe=NUM_LISTS,
        )
    )
    hits: Hits = {}
    for row in open_table(output).to_table(["query_id", "doc_id", "score"]).to_pylist():
        hits.setdefault(row["query_id"], []).append((row["doc_id"], row["score"]))
    return hits


def answers_of(release: Release) -> Hits:
    return {
        row["key"]: [(item["doc_id"], item["score"]) for item in row["items"]]
        for rows in release.open("answers").iter_tables()
        for row in rows.to_pylist()
    }


def shard_files(release: Release) -> set[str]:
    table = release.open("index")
    return {shard.index["path"] for shard in stored_shards(table.storage, table.generation)}


def test_one_percent_of_200_000_documents(unit_model, tmp_path, capsys):
    uri = str(tmp_path)
    corpus = ChangingCorpus(f"{uri}/corpus", NUM_DOCUMENTS, NUM_FILES, long_every=20)
    corpus.write()
    corpus.write_queries(uri, "queries.jsonl", NUM_QUERIES)
    corpus.write_queries(uri, "others.jsonl", NUM_QUERIES)
    index = IndexStep(
        factory=f"IVF{NUM_LISTS},Flat", num_shards=8, num_probes=300, max_delta_share=0.1
    )
    config = large_config(uri, unit_model, max(2000, NUM_DOCUMENTS), index)
    first = reindex(config)
    before = shard_files(open_release(config.output))
    assert first["index"]["num_shards"] == len(before) == 8

    new = corpus.change(0.01)
    corpus.rewrite_a_file()
    corpus.rename_a_file()
    corpus.write()
    second = reindex(config)
    assert second["released"]
    release = open_release(config.output)
    passages = second["vectors"]["passages"]
    share = second["vectors"]["passages_embedded"] / passages
    doc_ids = release.open("vectors").to_table(["doc_id"])["doc_id"]
    num_new = pc.sum(pc.is_in(doc_ids, pa.array(sorted(new), doc_ids.type))).as_py()
    assert second["vectors"]["passages_embedded"] == num_new
    assert 0 < share <= 0.012
    after = shard_files(release)
    assert before <= after, "shards of the first night were built anew"
    assert second["index"]["shards_made"] == len(after - before) > 0
    assert second["index"]["delta"]["rows"] == num_new
    assert sorted(set(indexed_documents(release))) == sorted(corpus.documents)

    scratch = reindex(replace(config, output=f"{uri}/scratch"))
    assert scratch["vectors"]["passages_embedded"] == passages
    fresh = open_release(f"{uri}/scratch")
    assert_same_vectors(release, fresh)
    others = f"{uri}/others.jsonl"
    hits = found(release, others, f"{uri}/found")
    assert len(hits) == NUM_QUERIES
    assert_same_hits(hits, found(fresh, others, f"{uri}/found-fresh"))
    assert len(answers_of(release)) == NUM_QUERIES
    assert_same_hits(answers_of(release), answers_of(fresh))
    with capsys.disabled():
        print(
            f"\n{len(corpus.documents):,} documents, {passages:,} passages: "
            f"{second['vectors']['passages_embedded']:,} embedded ({share:.2%}); first night "
            f"{first['seconds']:.0f} s, second {second['seconds']:.0f} s, from scratch "
            f"{scratch['seconds']:.0f} s; {len(before & after)} of {len(before)} shards reused"
        )


def recall_seen(release: Release, num_queries: int = 200) -> float:
    """Return recall@10 of a default search, for stored vectors against all of them."""
    matrix = release.open("vectors").to_matrix()
    queries = matrix[np.random.default_rng(0).choice(len(matrix), num_queries, replace=False)]
    exact = np.sort(queries @ matrix.T, axis=1)[:, -10]
    hits = IndexReader(release.open("index")).search(queries, top_k=10)
    scores = np.full((num_queries, 10), -np.inf)
    scores[hits["query"].to_numpy(), hits["rank"].to_numpy() - 1] = hits["score"].to_numpy()
    return float((scores >= exact[:, None] - 1e-5).mean())


def vacuumed_bytes(uri: str) -> int:
    """Return what the tables of the newest release take, reports aside."""
    vacuum(VacuumConfig(output=uri, keep=1, min_age_hours=0))
    objects = Storage(uri).iter_objects()
    return sum(listed.size for listed in objects if "/report." not in f"/{listed.path}")


def check_night(release: Release, corpus: ChangingCorpus) -> float:
    """Hold a release against the corpus; return the recall that others than the probes see."""
    documents = sorted(corpus.documents)
    assert sorted(release.open("vectors").to_table(["doc_id"])["doc_id"].to_pylist()) == documents
    assert sorted(indexed_documents(release)) == documents
    measured = release.open("index").generation.details["recall"]["10"]["mean"]
    assert measured >= TARGET_RECALL
    seen = recall_seen(release)
    assert seen >= TARGET_RECALL - 0.05
    return seen


def test_ten_nights(unit_model, tmp_path, capsys):
    uri = str(tmp_path)
    corpus = ChangingCorpus(f"{uri}/corpus", NIGHT_DOCUMENTS, NIGHT_FILES)
    corpus.write()
    corpus.write_queries(uri, "queries.jsonl", 50)
    index = IndexStep(
        factory=f"IVF{NIGHT_LISTS},Flat",
        target_recall=TARGET_RECALL,
        num_shards=4,
        num_probes=400,
        max_delta_share=MAX_DELTA_SHARE,
    )
    config = large_config(uri, unit_model, 20_000, index)
    reindex(config)
    deltas = []
    for night in range(1, NIGHTS + 1):
        share = corpus.rng.uniform(0.02, 0.05)
        new = corpus.change(share)
        if night % 3 == 0:
            corpus.rename_a_file()
        corpus.write()
        made = reindex(config)
        assert made["released"]
        assert made["vectors"]["passages_embedded"] == len(new)
        seen = check_night(open_release(config.output), corpus)
        deltas.append(made["index"]["delta"])
        assert deltas[-1]["share"] <= MAX_DELTA_SHARE
        with capsys.disabled():
            print(
                f"\nnight {night}: {share:.1%} changed, {len(new)} embedded, recall@10 "
                f"{made['index']['recall']['10']} (seen {seen:.4f}), {made['index']['num_shards']} "
                f"shards, {made['index']['shards_made']} made, delta {deltas[-1]['share']:.1%}, "
                f"{made['seconds']:.0f} s",
                end="",
            )
    assert {delta["rows"] == 0 for delta in deltas} == {True, False}, "never taken back"
    # Shards keep the vectors files they were built of, those of each night since they were.
    waiting = deltas[::-1].index(next(d for d in deltas[::-1] if not d["rows"]))
    grown = vacuumed_bytes(config.output)
    compact = replace(config, index=replace(index, max_delta_share=0.0))
    made = reindex(compact)
    assert made["released"] == (waiting > 0)
    check_night(open_release(config.output), corpus)
    assert made["index"]["delta"] == {"rows": 0, "dead": 0, "share": 0.0}
    reindex(replace(compact, output=f"{uri}/fresh"))
    fresh = vacuumed_bytes(f"{uri}/fresh")
    compacted = vacuumed_bytes(config.output)
    with capsys.disabled():
        print(
            f"\nvacuumed, against a fresh build: {grown / fresh:.2f} times the bytes with delta "
            f"shards of {waiting} nights, {compacted / fresh:.2f} after taking them back"
        )
    assert compacted <= 1.3 * fresh
    assert grown <= (1.3 + waiting) * fresh
