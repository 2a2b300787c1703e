"""A small corpus and the night over it: tiny model, several units, all kinds of tables."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.index.stored import stored_shards
from qbatch.manifest import read_verified
from qbatch.pipelines.reindex import (
    AnswersStep,
    EmbedStep,
    IndexStep,
    PublishStep,
    ReindexConfig,
    RelatedStep,
)
from qbatch.pipelines.release_gates import GatesConfig
from qbatch.release import Release, open_release
from qbatch.storage import Storage
from qbatch.tables import PublishedTable

LOOSE = GatesConfig(max_document_loss=1.0, min_overlap=0.0, max_score_drift=1.0)
"""For corpora that change more in a night than real ones do."""

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta")


def text_of(number: int, version: int = 0) -> str:
    """Return a text that no other number or version has."""
    words = [WORDS[(number * 7 + version * 3 + i * (number + 1)) % len(WORDS)] for i in range(5)]
    return f"{' '.join(words)} {number} {version}"


class Corpus:
    """Documents in files, by file and id; ``write`` brings the storage to the same state."""

    def __init__(self, uri: str, num_files: int = 6, per_file: int = 10) -> None:
        self.storage = Storage(uri)
        self.files: dict[str, dict[str, str]] = {
            f"{i:03d}.jsonl": {
                f"d{i * per_file + j}": text_of(i * per_file + j) for j in range(per_file)
            }
            for i in range(num_files)
        }

    @property
    def documents(self) -> dict[str, str]:
        """All texts by id."""
        return {doc_id: text for file in self.files.values() for doc_id, text in file.items()}

    def write(self) -> None:
        """Write files that changed, delete those that are gone."""
        for listed in list(self.storage.iter_objects()):
            if listed.path not in self.files:
                self.storage.delete(listed.path)
        for name, rows in self.files.items():
            lines = [json.dumps({"doc_id": d, "text": t}) for d, t in rows.items()]
            data = "\n".join(lines).encode()
            if name not in self._stored() or self.storage.read(name) != data:
                self.storage.write(name, data)

    def _stored(self) -> set[str]:
        return {listed.path for listed in self.storage.iter_objects()}


def write_queries(uri: str, num_queries: int = 12) -> None:
    rows = [{"query_id": f"q{i}", "text": text_of(i * 3)} for i in range(num_queries)]
    storage, _, name = uri.rpartition("/")
    Storage(storage).write(name, "\n".join(map(json.dumps, rows)).encode())


def night_config(uri: str, model: str, **changes) -> ReindexConfig:
    """Return a night over ``uri``/corpus that answers ``uri``/queries.jsonl."""
    return replace(
        ReindexConfig(
            output=f"{uri}/night",
            embed=EmbedStep(
                input=f"{uri}/corpus", model=model, dtype="float32", unit_bytes=700, max_actors=1
            ),
            index=IndexStep(factory="Flat", num_shards=2, num_probes=20),
            answers=AnswersStep(queries=f"{uri}/queries.jsonl", top_k=5, num_partitions=2),
            related=RelatedStep(enabled=True, top_k=3, num_partitions=2),
            publish=PublishStep(lease_s=60),
        ),
        **changes,
    )


def lists_of(table: PublishedTable) -> dict[str, list[tuple[str, float]]]:
    """Return precomputed rows by key, scores rounded to what a change of order may move."""
    return {
        row["key"]: [(item["doc_id"], round(item["score"], 4)) for item in row["items"]]
        for rows in table.iter_tables()
        for row in rows.to_pylist()
    }


def content_of(release: Release) -> Mapping[str, object]:
    """Return what a reader finds in a release: every row of every table, checked as it is read."""
    vectors = release.open("vectors").to_table(["doc_id", "vector"])
    found = {
        doc_id: [round(x, 5) for x in vector]
        for doc_id, vector in zip(
            vectors["doc_id"].to_pylist(), vectors["vector"].to_pylist(), strict=True
        )
    }
    return {
        "vectors": found,
        "documents": release.open("index").generation.counts["ntotal"],
        **{name: lists_of(release.open(name)) for name in ("answers", "related")},
    }


def served(uri: str) -> Mapping[str, object]:
    """Return the content of the newest release of a night."""
    return content_of(open_release(f"{uri}/night"))


def indexed_documents(release: Release) -> list[str]:
    """Return the document of every row of the index that can be found."""
    table = release.open("index")
    found: list[str] = []
    for shard in stored_shards(table.storage, table.generation):
        data = read_verified(table.storage, shard.ids)
        ids = pq.read_table(pa.BufferReader(data), columns=["doc_id"])["doc_id"].to_pylist()
        dead = set(shard.dead.tolist())
        found += [doc_id for row, doc_id in enumerate(ids) if row not in dead]
    return found
