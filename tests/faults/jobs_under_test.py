"""The jobs that meet faults: small inputs, and which rows must come out once each."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.index.stored import stored_shards
from qbatch.manifest import latest_generation, read_verified
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.filter_pairs import FilterPairsConfig, filter_pairs
from qbatch.pipelines.precompute import PrecomputeConfig, precompute
from qbatch.pipelines.reindex import PublishStep, reindex
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from qbatch.pipelines.search_index import SearchIndexConfig, search_index
from qbatch.release import open_release, release_numbers
from qbatch.storage import Storage
from qbatch.tables import open_table, open_vectors
from tests.candidate_tables import make_candidates, write_run
from tests.nights import Corpus, indexed_documents, night_config, write_queries
from tests.pair_tables import write_json_lines
from tests.tiny_models import write_tiny_cross_encoder, write_tiny_encoder
from tests.vector_tables import clustered, rows_table, split_files, write_vectors

Rows = Iterable[Hashable]

_NUM_FILES, _ROWS_PER_FILE, _BROKEN_LINE = 8, 12, 7
_DOCUMENTS, _DIM, _TOP_K = 300, 16, 5
_NUM_QUERIES = 12


class JobUnderTest(ABC):
    """One job and its input, which is written once."""

    name: str
    num_operations = 0
    """Durable operations of an undisturbed run."""

    @abstractmethod
    def __init__(self, folder: Path) -> None:
        """Write the input below a folder."""

    @abstractmethod
    def run(self, output: str) -> object:
        """Run the job."""

    def has_published(self, output: str) -> bool:
        """Tell whether readers find anything."""
        return latest_generation(Storage(output)) is not None

    @abstractmethod
    def expected(self) -> Rows:
        """Return what must be published, once each."""

    @abstractmethod
    def rows(self, output: str) -> Rows:
        """Return what is published."""


class Embed(JobUnderTest):
    name = "embed"

    def __init__(self, folder: Path) -> None:
        self._model = str(write_tiny_encoder(folder / "encoder"))
        self._corpus = Storage(f"{folder}/corpus")
        for i in range(_NUM_FILES):
            lines = [json.dumps({"text": f"row {j} of {i}"}) for j in range(_ROWS_PER_FILE)]
            lines[_BROKEN_LINE] = "{broken"
            self._corpus.write(f"{i}.jsonl", "\n".join(lines).encode())

    def run(self, output: str) -> object:
        config = EmbedCorpusConfig(
            input=self._corpus.uri,
            output=output,
            model=self._model,
            dtype="float32",
            unit_bytes=400,
            max_bad_fraction=0.2,
        )
        return embed_corpus(config)

    def expected(self) -> Rows:
        for file in Path(self._corpus.uri).iterdir():
            offset = 0
            for line in file.read_bytes().splitlines(keepends=True):
                yield (str(file), offset)
                offset += len(line)

    def rows(self, output: str) -> Rows:
        table = open_vectors(output)
        for part in (table.to_table(["object_uri", "row"]), table.rejects()):
            uris, rows = part["object_uri"].to_pylist(), part["row"].to_pylist()
            yield from zip(uris, rows, strict=True)


def _write_documents(uri: str) -> list[str]:
    doc_ids = [f"d{i}" for i in range(_DOCUMENTS)]
    table = rows_table(clustered(_DOCUMENTS, _DIM), doc_ids)
    write_vectors(uri, split_files(table, 4))
    return doc_ids


def _index_config(folder: Path, output: str) -> BuildIndexConfig:
    return BuildIndexConfig(
        vectors=f"{folder}/documents",
        output=output,
        factory="Flat",
        num_shards=2,
        num_probes=10,
    )


class Index(JobUnderTest):
    name = "index"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "of-index"
        self._doc_ids = _write_documents(f"{self._folder}/documents")

    def run(self, output: str) -> object:
        return build_index(_index_config(self._folder, output))

    def expected(self) -> Rows:
        return self._doc_ids

    def rows(self, output: str) -> Rows:
        index = open_table(output)
        for shard in stored_shards(index.storage, index.generation):
            data = read_verified(index.storage, shard.ids)
            yield from pq.read_table(pa.BufferReader(data), columns=["doc_id"])[
                "doc_id"
            ].to_pylist()


class Search(JobUnderTest):
    name = "search"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "of-search"
        _write_documents(f"{self._folder}/documents")
        build_index(_index_config(self._folder, f"{self._folder}/index"))
        self._queries = [f"q{i}" for i in range(50)]
        table = rows_table(clustered(len(self._queries), _DIM, seed=1), self._queries)
        write_vectors(f"{self._folder}/queries", split_files(table, 2))

    def run(self, output: str) -> object:
        config = SearchIndexConfig(
            index=f"{self._folder}/index",
            queries=f"{self._folder}/queries",
            output=output,
            top_k=_TOP_K,
        )
        return search_index(config)

    def expected(self) -> Rows:
        return [(query, rank) for query in self._queries for rank in range(1, _TOP_K + 1)]

    def rows(self, output: str) -> Rows:
        table = open_table(output).to_table(["query_id", "rank"])
        return zip(table["query_id"].to_pylist(), table["rank"].to_pylist(), strict=True)


class Rerank(JobUnderTest):
    name = "rerank"

    def __init__(self, folder: Path) -> None:
        self._model = str(write_tiny_cross_encoder(folder / "cross-encoder"))
        self._made = make_candidates(num_queries=12, num_candidates=10, num_documents=60)
        self._flags = write_run(f"{folder}/of-rerank", self._made)

    def run(self, output: str) -> object:
        config = RerankCandidatesConfig(
            **self._flags,
            output=output,
            model=self._model,
            dtype="float32",
            unit_pairs=30,
            num_partitions=4,
        )
        return rerank_candidates(config)

    def expected(self) -> Rows:
        return [(query, document) for query, document, _, _ in self._made.rows]

    def rows(self, output: str) -> Rows:
        table = open_table(output).to_table(["query_id", "doc_id"])
        return zip(table["query_id"].to_pylist(), table["doc_id"].to_pylist(), strict=True)


class Precompute(JobUnderTest):
    name = "precompute"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "of-precompute"
        self._doc_ids = _write_documents(f"{self._folder}/documents")
        build_index(_index_config(self._folder, f"{self._folder}/index"))

    def run(self, output: str) -> object:
        config = PrecomputeConfig(
            index=f"{self._folder}/index",
            output=output,
            mode="items",
            top_k=_TOP_K,
            num_partitions=4,
        )
        return precompute(config)

    def expected(self) -> Rows:
        return self._doc_ids

    def rows(self, output: str) -> Rows:
        for table in open_table(output).iter_tables():
            yield from table["key"].to_pylist()


class Filter(JobUnderTest):
    name = "filter"

    def __init__(self, folder: Path) -> None:
        self._model = str(write_tiny_encoder(folder / "pair-encoder"))
        self._pairs = f"{folder}/of-filter"
        for i in range(4):
            rows = [
                {"doc_id": f"d{i}-{j}", "query": f"ask {j} of {i}", "document": f"told {i} {j}"}
                for j in range(_ROWS_PER_FILE)
            ]
            rows[_BROKEN_LINE]["query"] = None
            write_json_lines(self._pairs, f"{i}.jsonl", rows)

    def run(self, output: str) -> object:
        config = FilterPairsConfig(
            pairs=self._pairs,
            output=output,
            model=self._model,
            dtype="float32",
            unit_bytes=400,
            quantile=0.3,
            max_bad_fraction=0.2,
        )
        return filter_pairs(config)

    def expected(self) -> Rows:
        return [f"d{i}-{j}" for i in range(4) for j in range(_ROWS_PER_FILE)]

    def rows(self, output: str) -> Rows:
        table = open_table(output)
        for part in (table.to_table(["doc_id"]), table.rejects()):
            yield from part["doc_id"].to_pylist()


class Night(JobUnderTest):
    name = "night"

    def __init__(self, folder: Path) -> None:
        self._uri = str(folder / "of-night")
        self._model = str(write_tiny_encoder(folder / "night-encoder"))
        self._corpus = Corpus(f"{self._uri}/corpus", num_files=3)
        self._corpus.write()
        write_queries(f"{self._uri}/queries.jsonl", _NUM_QUERIES)

    def run(self, output: str) -> object:
        """Run without a lease: what is right must not depend on it."""
        config = night_config(self._uri, self._model, publish=PublishStep(lease_s=0))
        return reindex(replace(config, output=output))

    def has_published(self, output: str) -> bool:
        return bool(release_numbers(Storage(output)))

    def expected(self) -> Rows:
        for name in ("vectors", "index", "related"):
            yield from ((name, doc_id) for doc_id in self._corpus.documents)
        yield from (("answers", f"q{i}") for i in range(_NUM_QUERIES))

    def rows(self, output: str) -> Rows:
        release = open_release(output)
        vectors = release.open("vectors").to_table(["doc_id"])["doc_id"].to_pylist()
        yield from (("vectors", doc_id) for doc_id in vectors)
        yield from (("index", doc_id) for doc_id in indexed_documents(release))
        for name in ("related", "answers"):
            for table in release.open(name).iter_tables(["key"]):
                yield from ((name, key) for key in table["key"].to_pylist())


JOBS: dict[str, Callable[[Path], JobUnderTest]] = {
    job.name: job for job in (Embed, Index, Search, Rerank, Precompute, Filter, Night)
}
