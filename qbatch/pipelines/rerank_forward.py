"""The second stage: an actor that holds the models of a cascade and scores pairs with them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qbatch.corpus.reasons import KILLED_PROCESS, NON_FINITE_SCORE
from qbatch.models.hub import resolve_model
from qbatch.models.remote_reranker import RemoteReranker
from qbatch.models.rerank_templates import answer_ids
from qbatch.models.rerank_tokens import CandidateTokens
from qbatch.models.tokenization import read_tokenizer
from qbatch.pipelines.embed_task import unit_row, unit_table
from qbatch.pipelines.rerank_pairs import pair_rejects
from qbatch.pipelines.rerank_task import RerankStage, RerankTask, query_bounds, tokens_of
from qbatch.pipelines.trial import CarefulActor, Trial

if TYPE_CHECKING:
    from qbatch.models.reranker import Reranker

Tokens = Mapping[int, list[CandidateTokens]]
"""The unit's queries as each tokenizer of the cascade reads them."""


def build_reranker(
    task: RerankTask, stage: RerankStage, num_threads: int | None = None
) -> "Reranker | RemoteReranker":
    """Load one model of a task in this process, or prepare to ask its server."""
    if stage.server is not None:
        folder = resolve_model(stage.model, stage.revision)
        tokenizer = read_tokenizer(folder, stage.spec.tokenizer)
        return RemoteReranker(stage.server, answer_ids(tokenizer))
    from qbatch.models.reranker import RerankerConfig  # noqa: PLC0415 - drivers need no torch

    config = RerankerConfig(
        model_path=resolve_model(stage.model, stage.revision),
        scorer=stage.spec.scorer,
        dtype=task.dtype,
        max_tokens=stage.max_tokens,
        token_budget=task.token_budget,
        num_threads=num_threads,
        instruction=stage.instruction,
    )
    return config.build()


class RerankActor(CarefulActor):
    """Holds the models; gives a unit's pairs their log-odds, cutting between models.

    One actor holds them all: pools that share a GPU would wait for each other, and what a small
    model leaves over is at hand for the large one.
    """

    def __init__(self, task: RerankTask, num_threads: int) -> None:
        self._stages = task.stages
        self._rerankers = [build_reranker(task, stage, num_threads) for stage in task.stages]
        self._idle_since = time.perf_counter()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Replace the tokens of one unit by the log-odds of the pairs that come through."""
        return self._rank(batch, find_killers=lambda *_: [])

    def careful(self, batch: pa.Table, trial: Trial) -> pa.Table:
        """Do the same without pairs that kill the process; they are rejected."""

        def find_killers(bounds: np.ndarray, tokens: Tokens) -> list[int]:
            owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))

            def probe(pairs: list[int]) -> None:
                query = owner[pairs[0]]
                rows = np.array(pairs) - bounds[query]
                for stage, reranker in zip(self._stages, self._rerankers, strict=True):
                    reranker.score_tokens([tokens[stage.tokens][query].take(rows)])

            groups = [range(*pair) for pair in pairwise(bounds) if np.ptp(pair)]
            return trial.killers(groups, probe, content=documents.__getitem__)

        documents = unit_table(batch, "pairs")["doc_id"].to_pylist()
        return self._rank(batch, find_killers)

    def _rank(
        self, batch: pa.Table, find_killers: Callable[[np.ndarray, Tokens], list[int]]
    ) -> pa.Table:
        started = time.perf_counter()
        pairs, rejects = unit_table(batch, "pairs"), unit_table(batch, "rejects")
        tokens = {
            stage.tokens: tokens_of(unit_table(batch, f"tokens_{stage.tokens}"))
            for stage in self._stages
        }
        bounds = query_bounds(pairs)
        killers = find_killers(bounds, tokens)
        before = [replace(reranker.stats) for reranker in self._rerankers]
        rows, keys, lost = self._score(bounds, tokens, killers)
        stats = json.loads(batch["stats"][0].as_py())
        stats["cut"] += len(pairs) - len(rows) - len(lost) - len(killers)
        stats |= self._token_counts(before)
        stats["seconds"]["idle"] = started - self._idle_since
        self._idle_since = time.perf_counter()
        stats["seconds"]["forward"] = self._idle_since - started
        detail = "the model gave NaN or infinity; compute in --dtype bfloat16 or float32"
        odd = pair_rejects(pairs.take(pa.array(lost)), NON_FINITE_SCORE, detail)
        deadly = pair_rejects(
            pairs.take(pa.array(killers, pa.int64())), KILLED_PROCESS, "its process died each time"
        )
        ranked = pairs.take(pa.array(rows)).append_column("log_odds", pa.array(keys))
        return unit_row(
            batch["unit_key"][0].as_py(),
            stats,
            pairs=ranked,
            rejects=pa.concat_tables([rejects, odd, deadly]),
        )

    def _score(
        self, bounds: np.ndarray, tokens: Tokens, killers: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs that come through all stages, their keys, and those without a number."""
        is_alive = np.ones(bounds[-1], bool)
        is_alive[np.array(killers, np.int64)] = False
        kept = [np.flatnonzero(is_alive[slice(*pair)]) for pair in pairwise(bounds)]
        keys: list[np.ndarray] = []
        lost = [np.empty(0, np.int64)]
        for stage, reranker in zip(self._stages, self._rerankers, strict=True):
            groups = [g.take(rows) for g, rows in zip(tokens[stage.tokens], kept, strict=True)]
            keys = reranker.score_tokens(groups, self.on_pack)
            for i, own in enumerate(keys):
                finite = np.isfinite(own)
                lost.append(bounds[i] + kept[i][~finite])
                kept[i], keys[i] = kept[i][finite], own[finite]
                if stage.keep is not None:
                    # Rows are in retrieval order, which a stable sort keeps among equals.
                    best = np.argsort(-keys[i], kind="stable")[: stage.keep]
                    kept[i] = np.sort(kept[i][best])
        rows = [np.empty(0, np.int64), *(b + k for b, k in zip(bounds, kept, strict=False))]
        found = [np.empty(0, np.float32), *keys]
        return np.concatenate(rows), np.concatenate(found), np.concatenate(lost)

    def _token_counts(self, before: list[Any]) -> dict[str, int]:
        after = [reranker.stats for reranker in self._rerankers]
        changes = list(zip(before, after, strict=True))
        return {
            "packs": sum(b.num_packs - a.num_packs for a, b in changes),
            "tokens": sum(b.num_tokens - a.num_tokens for a, b in changes),
            "tokens_saved": sum(b.num_saved - a.num_saved for a, b in changes),
        }
