"""What the jobs published, for notebooks and services: opened at one generation, as Arrow tables.

    import qbatch

    index = qbatch.open_index("s3://bucket/index")
    hits = index.search(["an archive of public web pages"], top_k=5)
    hits.to_pandas()  # or polars.from_arrow(hits)

What is published later does not change what an opened table reads. Nothing here needs Ray.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qbatch.errors import ConfigError
from qbatch.release import open_release
from qbatch.tables import PublishedTable, open_table, open_vectors

if TYPE_CHECKING:
    from qbatch.index.searching import ShardSearcher
    from qbatch.models.embedder import Embedder

__all__ = ["IndexReader", "open_index", "open_release", "open_run", "open_table", "open_vectors"]


def open_run(uri: str, generation: int | None = None) -> PublishedTable:
    """Open a run, reranked or not, at its newest generation, or at a given one.

    Raises:
        NoInputError: Nothing was published there.
        ConfigError: It holds something else.
    """
    return _of_kind(open_table(uri, generation), "run")


def open_index(uri: str, generation: int | None = None) -> "IndexReader":
    """Open an index at its newest generation, or at a given one; shards are read when searched.

    Raises:
        NoInputError: Nothing was published there.
        ConfigError: It holds something else.
    """
    return IndexReader(_of_kind(open_table(uri, generation), "index"))


def _of_kind(table: PublishedTable, kind: str) -> PublishedTable:
    if table.generation.kind != kind:
        raise ConfigError(
            f"{table.storage.uri} holds {table.generation.kind}, not {kind}; give the --output of "
            "the job that makes one"
        )
    return table


class IndexReader:
    """A published index, searched in this process: for a look at it, not for millions of queries.

    All shards are held in memory from the first search on.
    """

    def __init__(self, table: PublishedTable) -> None:
        """Wrap an opened index; ``open_index`` is the way to get one."""
        self.table = table
        self._embedders: dict[str, Embedder] = {}

    @property
    def details(self) -> dict[str, Any]:
        """What the build found out: recall, effort, factory, share of delta shards."""
        return dict(self.table.generation.details)

    def search(
        self,
        queries: np.ndarray | Sequence[str],
        *,
        top_k: int = 10,
        nprobe: int | None = None,
        instruction: str | None = None,
        model: str | None = None,
    ) -> pa.Table:
        """Return the best documents of each query.

        Args:
            queries: float32 (queries, dim), or texts, which the index's own model embeds.
            top_k: Documents a query.
            nprobe: Inverted lists visited; None is what the build found necessary.
            instruction: Task sentence for texts; None is the model's own.
            model: Where the index's model lies here; None is where it lay when it was used.

        Returns:
            ``query`` (int32, its place), ``row``, ``score``, ``doc_id``, ``passage_id``, ``rank``;
            best first.

        Raises:
            ConfigError: Vectors have another width, or the model is not that of the index.
            IntegrityError: A shard is damaged.
        """
        from qbatch.index.searching import (  # noqa: PLC0415 - FAISS, only for those who search
            SearchOptions,
            hits_table,
            merge_hits,
        )

        if isinstance(queries, np.ndarray):
            vectors = self._checked(queries)
        else:
            vectors = self._embedded(queries, instruction, model)
        effort = nprobe or next(iter(self.details["search"].values()), 0)
        options = SearchOptions(top_k=top_k, effort=effort)
        found = [
            hits_table(searcher.search(vectors, options), searcher, first_row)
            for searcher, first_row in self._searchers
        ]
        return merge_hits(found, top_k)

    @cached_property
    def _searchers(self) -> list[tuple["ShardSearcher", int]]:
        """Of each shard, with its first row over all shards."""
        from qbatch.index.columns import VectorColumn  # noqa: PLC0415
        from qbatch.index.searching import ShardSearcher  # noqa: PLC0415
        from qbatch.index.stored import load_shard, stored_shards  # noqa: PLC0415

        storage, generation = self.table.storage, self.table.generation
        fingerprint = generation.fingerprint
        column = VectorColumn.of(fingerprint["embedding"], fingerprint["dim"])
        searchers = []
        for shard in stored_shards(storage, generation):
            loaded = load_shard(storage, shard, column)
            searcher = ShardSearcher(
                loaded.index, loaded.ids, column.metric, allowed=loaded.allowed
            )
            searchers.append((searcher, shard.row_base))
        return searchers

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        from qbatch.index.columns import VectorColumn  # noqa: PLC0415

        fingerprint = self.table.generation.fingerprint
        if vectors.ndim != 2 or vectors.shape[1] != fingerprint["dim"]:
            raise ConfigError(
                f"queries have the shape {vectors.shape}, the index takes (queries, "
                f"{fingerprint['dim']}); give vectors of its model"
            )
        column = VectorColumn.of(fingerprint["embedding"], fingerprint["dim"])
        return column.unit(np.array(vectors, np.float32, order="C"))

    def _embedded(
        self, texts: Sequence[str], instruction: str | None, model: str | None
    ) -> np.ndarray:
        from qbatch.models.prompts import query_prompt  # noqa: PLC0415
        from qbatch.models.tokenization import TextTokenizer  # noqa: PLC0415

        embedder = self._embedder(model or self.details["embedding"]["model"])
        spec = embedder.spec
        prompt = query_prompt(spec.prompts, architecture=spec.architecture, instruction=instruction)
        limit = self.table.generation.fingerprint["embedding"]["max_tokens"]
        tokenizer = TextTokenizer.load(spec.path, limit, spec.tokenizer)
        batch = tokenizer.encode([prompt + text for text in texts])
        return embedder.embed(batch.ids, batch.lengths)

    def _embedder(self, model: str) -> "Embedder":
        """Load the model of the index, once; another one is refused."""
        if model in self._embedders:
            return self._embedders[model]
        from qbatch.index.columns import check_same_space, weights_of  # noqa: PLC0415
        from qbatch.models.embedder import EmbedderConfig  # noqa: PLC0415
        from qbatch.models.hub import resolve_model  # noqa: PLC0415
        from qbatch.models.loading import weights_sha256  # noqa: PLC0415

        fingerprint = self.table.generation.fingerprint
        embedding = fingerprint["embedding"]
        path = resolve_model(model, self.details["embedding"]["revision"])
        embedder = EmbedderConfig(
            model_path=path,
            dtype=embedding["dtype"],
            weights=weights_of(embedding),
            dim=fingerprint["dim"],
        ).build()
        spec = embedder.spec
        ours = {
            "weights_sha256": weights_sha256(spec.path),
            "tokenizer_sha256": spec.tokenizer_sha256,
            "architecture": spec.architecture,
            "pooling": spec.pooling,
            "normalize": spec.normalize,
            "dtype": embedding["dtype"],
            "weights": weights_of(embedding),
        }
        check_same_space(embedding, ours)
        self._embedders[model] = embedder
        return embedder
