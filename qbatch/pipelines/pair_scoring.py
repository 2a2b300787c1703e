"""Queries and documents of pairs to vectors: what filtering and mining both begin with.

Units go through the embed job's actors, each pair as two texts with their own prompts.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from qbatch.corpus.spans import Unit
from qbatch.models.hub import resolve_model
from qbatch.models.loading import ModelSpec
from qbatch.models.prompts import document_prompt, query_prompt
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.cluster import PoolPlan
from qbatch.pipelines.embed_forward import EmbedActor
from qbatch.pipelines.embed_task import EmbedTask, unit_row, unit_table
from qbatch.pipelines.pair_source import PairSource, read_pairs
from qbatch.pipelines.unit_stream import Stages, block_size, run_stages
from qbatch.schema import REJECTS, vector_matrix

log = logging.getLogger(__name__)

_MAX_BLOCK_UNITS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPrompts:
    """What stands before the texts of pairs, by the model and the pair."""

    architecture: str
    stored: Mapping[str, str]
    """Beside the model, by name."""
    instruction: str | None
    """Of queries whose pair names none; None is the model's own."""

    @classmethod
    def of(cls, spec: ModelSpec, instruction: str | None) -> "PairPrompts":
        """Return the prompts of a model.

        Raises:
            ConfigError: An instruction was given for a model that takes none.
        """
        query_prompt(spec.prompts, architecture=spec.architecture, instruction=instruction)
        return cls(
            architecture=spec.architecture, stored=dict(spec.prompts), instruction=instruction
        )

    @property
    def takes_instructions(self) -> bool:
        """Whether the instructions of pairs count; other models have fixed prompts."""
        return self.architecture == "qwen3"

    def query(self, instruction: str | None) -> str:
        """Return the prompt of a query."""
        own = instruction if self.takes_instructions else None
        return query_prompt(
            self.stored, architecture=self.architecture, instruction=own or self.instruction
        )

    def document(self, instruction: str | None) -> str:
        """Return the prompt of a document; one with an instruction is embedded as a query."""
        if instruction and self.takes_instructions:
            return self.query(instruction)
        return document_prompt(self.stored)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringTask:
    """What every process that scores pairs needs to know; it travels, models do not."""

    source: PairSource
    embed: EmbedTask
    prompts: PairPrompts


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a manifest gives them back: equal ones must not look like a change."""
    stored: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return stored


def scoring_fingerprint(task: ScoringTask, embedding: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything besides the pairs that changes their vectors."""
    return {
        **{key: value for key, value in embedding.items() if key != "prompt"},
        "prompts": {
            "stored": dict(task.prompts.stored),
            "instruction": task.prompts.instruction,
        },
        "reading": as_stored(task.source.corpus.fingerprint()),
    }


def score_units(
    pending: Sequence[tuple[str, Unit]],
    task: ScoringTask,
    pool: PoolPlan,
    write: Callable[..., str],
) -> Iterator[tuple[dict[str, Any], str]]:
    """Embed the pairs of units; yield stats and what ``write`` returned, as units are done.

    Args:
        pending: Key and unit.
        task: Shared by all.
        pool: Of the actors.
        write: Stores the vectors of a unit, called with its key, the unit, and the float32 vectors
            of queries and of documents, both (pairs, dim).
    """
    if not pending:
        return
    if not task.prompts.takes_instructions:
        log.info(
            "%s takes no instructions: those of the pairs are kept, but do not count here",
            task.embed.model,
        )
    size = block_size(len(pending), _MAX_BLOCK_UNITS)
    blocks = (_plan_rows(pending[i : i + size]) for i in range(0, len(pending), size))
    stages = Stages(
        read=partial(read_and_tokenize, task=task),
        actor=EmbedActor,
        actor_arguments={"task": task.embed, "num_threads": pool.threads_per_actor},
        write=partial(_write_vectors, write=write),
    )
    for told in run_stages(blocks, stages, pool):
        yield json.loads(told["stats"]), told["written"]


def _plan_rows(units: Sequence[tuple[str, Unit]]) -> pa.Table:
    keys = pa.array([key for key, _ in units], pa.string())
    spans = pa.array([unit.to_json() for _, unit in units], pa.large_string())
    return pa.table({"unit_key": keys, "spans": spans})


def read_and_tokenize(batch: pa.Table, *, task: ScoringTask) -> pa.Table:
    """Turn a unit into the tokens of its queries, then of its documents."""
    started = time.perf_counter()
    spans = batch["spans"][0].as_py()
    pairs = read_pairs(Unit.from_json(spans), task.source).pairs
    read_s = time.perf_counter() - started
    passages = tokenize_pairs(pairs, task)
    stats = {
        "pairs": len(pairs),
        "spans": spans,
        "seconds": {"read": read_s, "tokenize": time.perf_counter() - started - read_s},
    }
    nothing = pa.table({})
    return unit_row(
        batch["unit_key"][0].as_py(),
        stats,
        passages=passages,
        rejects=REJECTS.empty_table(),
        reused=nothing,
        places=nothing,
    )


def tokenize_pairs(pairs: pa.Table, task: ScoringTask) -> pa.Table:
    """Return ``token_ids`` and ``num_tokens``: all queries, then all documents.

    Texts longer than the model takes, or ``max_tokens``, lose their end.
    """
    query_of = functools.cache(task.prompts.query)
    document_of = functools.cache(task.prompts.document)
    texts = [
        query_of(instruction) + text for instruction, text in _texts(pairs, "instruction", "query")
    ] + [
        document_of(instruction) + text
        for instruction, text in _texts(pairs, "document_instruction", "document")
    ]
    embed = task.embed
    path = resolve_model(embed.model, embed.revision)
    tokens = TextTokenizer.load(path, embed.max_tokens, embed.tokenizer).encode(texts)
    offsets = np.cumsum([0, *tokens.lengths], dtype=np.int64)
    ids = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens.ids))
    return pa.table({"token_ids": ids, "num_tokens": tokens.lengths})


def _texts(pairs: pa.Table, instruction: str, text: str) -> Iterator[tuple[str | None, str]]:
    return zip(pairs[instruction].to_pylist(), pairs[text].to_pylist(), strict=True)


def _write_vectors(batch: pa.Table, *, write: Callable[..., str]) -> pa.Table:
    started = time.perf_counter()
    stats = json.loads(batch["stats"][0].as_py())
    unit = Unit.from_json(stats.pop("spans"))
    vectors = unit_table(batch, "vectors")["vector"].combine_chunks()
    matrix = vector_matrix(vectors) if len(vectors) else np.empty((0, 1), np.float32)
    half = len(matrix) // 2
    written = write(batch["unit_key"][0].as_py(), unit, matrix[:half], matrix[half:])
    stats["seconds"]["write"] = time.perf_counter() - started
    return pa.table({"stats": [json.dumps(stats)], "written": [written]})


def cosines(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return the cosine of each query and its document, float32; NaN where a vector has none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        products = np.einsum("ij,ij->i", queries, documents, dtype=np.float64)
        norms = np.linalg.norm(queries, axis=1) * np.linalg.norm(documents, axis=1)
        found: np.ndarray = (products / norms).astype(np.float32)
    return found
