"""The second stage: an actor that holds the model and turns token ids into vectors."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from qbatch.models.embed_stats import EmbedStats
from qbatch.models.hub import resolve_model
from qbatch.models.packing import distinct_texts, plan_packs
from qbatch.models.remote_embedder import RemoteEmbedder
from qbatch.pipelines.embed_task import EmbedTask, unit_row, unit_table
from qbatch.pipelines.trial import CarefulActor, Trial
from qbatch.schema import vector_array

if TYPE_CHECKING:
    from qbatch.models.embedder import Embedder


def build_embedder(task: EmbedTask, num_threads: int | None = None) -> "Embedder | RemoteEmbedder":
    """Load the model of a task in this process, or prepare to ask its server."""
    if task.server is not None:
        return RemoteEmbedder(
            task.server,
            dim=max(task.dims),
            normalize=task.normalize,
            token_budget=task.token_budget,
        )
    from qbatch.models.embedder import EmbedderConfig  # noqa: PLC0415 - drivers need no torch

    config = EmbedderConfig(
        model_path=resolve_model(task.model, task.revision),
        dtype=task.dtype,
        weights=task.weights,
        dim=max(task.dims),
        token_budget=task.token_budget,
        num_threads=num_threads,
    )
    return config.build()


class EmbedActor(CarefulActor):
    """Holds the model; turns a unit's token ids into vectors."""

    def __init__(self, task: EmbedTask, num_threads: int) -> None:
        self._embedder = build_embedder(task, num_threads)
        self._idle_since = time.perf_counter()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Replace the token ids of one unit by its vectors, float32 of the widest width."""
        return self._embed(batch, find_killers=lambda _: [])

    def careful(self, batch: pa.Table, trial: Trial) -> pa.Table:
        """Do the same with NaN for passages that kill the process; ``stats`` names them."""

        def find_killers(passages: pa.Table) -> list[int]:
            ids, lengths = _tokens(passages)
            return trial.killers(
                [pack.tolist() for pack in plan_packs(lengths, self._embedder.token_budget)],
                lambda rows: embed_passages(self._embedder, passages.take(pa.array(rows))),
                content=distinct_texts(ids, lengths)[1].tolist().__getitem__,
            )

        return self._embed(batch, find_killers)

    def _embed(self, batch: pa.Table, find_killers: Callable[[pa.Table], list[int]]) -> pa.Table:
        started = time.perf_counter()
        passages = unit_table(batch, "passages")
        killers = find_killers(passages)
        before = replace(self._embedder.stats)
        vectors = self._embed_without(killers, passages)
        stats = json.loads(batch["stats"][0].as_py())
        stats |= _pack_stats(before, self._embedder)
        stats["killers"] = killers
        stats["seconds"]["idle"] = started - self._idle_since
        self._idle_since = time.perf_counter()
        stats["seconds"]["forward"] = self._idle_since - started
        return unit_row(
            batch["unit_key"][0].as_py(),
            stats,
            passages=passages.drop_columns(["token_ids"]),
            **{name: unit_table(batch, name) for name in ("rejects", "reused", "places")},
            vectors=pa.table({"vector": vector_array(vectors)}),
        )

    def _embed_without(self, killers: list[int], passages: pa.Table) -> np.ndarray:
        if not killers:
            return embed_passages(self._embedder, passages, self.on_pack)
        left = np.setdiff1d(np.arange(len(passages)), killers)
        vectors = np.full((len(passages), self._embedder.dim), np.nan, np.float32)
        some = passages.take(pa.array(left))
        vectors[left] = embed_passages(self._embedder, some, self.on_pack)
        return vectors


def embed_passages(
    embedder: "Embedder | RemoteEmbedder",
    passages: pa.Table,
    on_pack: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return float32 vectors of shape (passages, widest width) in the order of ``passages``."""
    return embedder.embed(*_tokens(passages), on_pack)


def _tokens(passages: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    ids = passages["token_ids"].combine_chunks()
    return ids.flatten().to_numpy(zero_copy_only=False), passages["num_tokens"].to_numpy()


def _pack_stats(before: EmbedStats, embedder: "Embedder | RemoteEmbedder") -> dict[str, int]:
    after = embedder.stats
    packs = after.num_packs - before.num_packs
    return {
        "packs": packs,
        "tokens_packed": after.num_computed - before.num_computed,
        "pack_room": packs * embedder.token_budget,
    }
