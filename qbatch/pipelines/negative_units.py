"""The second half of mining: a block of pairs gets its candidates, their texts and a judgement.

choose candidates by rank, score and id -> their texts come from the corpus -> a reranker drops
false negatives, if there is one -> write the pairs with what is left.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from qbatch.corpus.reasons import LOW_RANK, NON_FINITE_VECTOR
from qbatch.corpus.spans import Unit
from qbatch.manifest import fingerprint_id
from qbatch.models.hub import resolve_model
from qbatch.models.rerank_tokens import CandidateGroup, scores_from_keys
from qbatch.models.reranker import RerankerConfig
from qbatch.pipelines.embed_task import unit_row, unit_table
from qbatch.pipelines.negative_search import FACTS
from qbatch.pipelines.pair_source import (
    PAIRS_IDENTITY,
    PairRows,
    PairSource,
    read_pairs,
    reject_pairs,
    unit_counts,
)
from qbatch.pipelines.rerank_shuffle import stable_hashes
from qbatch.pipelines.rerank_task import RerankStage
from qbatch.pipelines.segment_files import find_segment, read_segment, table_of
from qbatch.pipelines.unit_files import (
    read_partial,
    write_partial,
    write_rejects,
    write_unit_file,
)
from qbatch.schema import REJECTS, TRAINING_PAIRS, ComputeDtype
from qbatch.storage import Storage
from qbatch.tables import open_table
from qbatch.training.near_duplicates import text_keys
from qbatch.training.negatives import NegativeRules, Positives

_SPARE = 4
"""Candidates looked at for each negative wanted: some turn out to be positives."""

_READ_THREADS = 16

_CANDIDATES = pa.schema(
    [
        pa.field("pair", pa.int32(), nullable=False),  # place in the block
        pa.field("doc_id", pa.large_string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""What may become a negative, in the order in which it is looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiningUnit:
    """The pairs that one block of the search asked for."""

    pairs: str
    """JSON of the unit of pairs."""
    start: int
    stop: int
    """Which of its pairs; the first block also has the unit's rejects."""
    vectors: tuple[str, str] | None
    """Path and sha256 of the unit's query vectors; None for a unit without pairs."""
    run: tuple[str, str] | None
    """Path and sha256 of what was found."""

    def key(self, fingerprint: str) -> str:
        """Return the name of this unit's output under a fingerprint."""
        return fingerprint_id({**asdict(self), "fingerprint": fingerprint})

    def to_json(self) -> str:
        """Return the unit for a plan."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "MiningUnit":
        """Return the unit that ``to_json`` wrote."""
        fields = json.loads(text)
        for name in ("vectors", "run"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class MiningTask:
    """What every process of a job needs to know; it travels, models do not."""

    output: str
    vectors_uri: str
    run_uri: str
    source: PairSource
    rules: NegativeRules
    judge: RerankStage | None
    max_judge_score: float
    dtype: ComputeDtype
    token_budget: int | None
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFiles:
    """The files of texts by unit; they travel."""

    paths: tuple[tuple[str, int], ...]
    """Path and size."""
    parts: dict[str, int]
    """Which segment of each file belongs to a unit, by key."""
    choices: dict[str, str]
    """Where the candidates of a unit are stored, by key."""


def _read_listed(uri: str, entry: tuple[str, str], columns: Sequence[str]) -> pa.Table:
    path, sha256 = entry
    return open_table(uri).read_file({"path": path, "sha256": sha256}, columns)


def _own_pairs(unit: MiningUnit, task: MiningTask) -> PairRows:
    """Return the pairs of a unit's block; the first block has rejects and all rows of its unit."""
    rows = read_pairs(Unit.from_json(unit.pairs), task.source)
    pairs = rows.pairs.slice(unit.start, unit.stop - unit.start)
    if unit.start:
        return PairRows(pairs, REJECTS.empty_table(), len(pairs))
    return PairRows(pairs, rows.rejects, len(pairs) + rows.rows_in - len(rows.pairs))


def choose_candidates(
    unit: MiningUnit, unit_key: str, task: MiningTask, positive_ids: Positives
) -> str:
    """Store the candidates of a unit as a partial result, best first; return its key.

    With them go the ranks of the positives, and how many documents fell to each rule.
    """
    candidates, dropped = _CANDIDATES.empty_table(), Counter[str]()
    positive_ranks = np.empty(0, np.int64)
    if unit.vectors is not None and unit.run is not None:
        facts = _read_listed(task.vectors_uri, unit.vectors, FACTS)
        facts = facts.slice(unit.start, unit.stop - unit.start)
        found = _read_listed(task.run_uri, unit.run, ["query_id", "doc_id", "rank", "score"])
        pairs = pc.subtract(found["query_id"].cast(pa.int32()), pa.scalar(unit.start, pa.int32()))
        found = found.set_column(0, "pair", pairs)
        candidates, positive_ranks, dropped = _eligible(
            found.cast(_CANDIDATES), facts, task.rules, positive_ids
        )
    told = {"dropped": dropped, "positive_ranks": positive_ranks.tolist()}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    write_partial(Storage(task.output), unit_key, candidates.replace_schema_metadata(metadata))
    return unit_key


def _eligible(
    found: pa.Table, facts: pa.Table, rules: NegativeRules, positive_ids: Positives
) -> tuple[pa.Table, np.ndarray, Counter[str]]:
    """Return _CANDIDATES that keep the rules, the rank of each positive, and how many fell to each.

    A positive's rank counts what was found with a higher score, without other positives of its
    query.
    """
    pairs, ranks = found["pair"].to_numpy(), found["rank"].to_numpy()
    scores = found["score"].to_numpy()
    queries = facts["query_key"].to_numpy()[pairs]
    ids = stable_hashes(found["doc_id"]) if len(found) else np.empty(0, np.uint64)
    is_positive = positive_ids.contain(queries, ids)
    # A long positive is indexed in passages: the best of them may score above its beginning.
    positive = facts["positive_score"].to_numpy().copy()
    own = ids == facts["id_key"].to_numpy()[pairs]
    np.maximum.at(positive, pairs[own], scores[own])
    is_above = ~is_positive & (scores > positive[pairs])
    positive_ranks = 1 + np.bincount(pairs[is_above], minlength=len(facts))
    tests = {
        "pair": rules.finds_positive(positive_ranks)[pairs],
        "rank": rules.in_window(ranks),
        "positive": ~is_positive,
        "margin": rules.below_positive(scores, positive[pairs]),
    }
    passed, dropped = np.ones(len(found), bool), Counter[str]()
    for name, test in tests.items():
        dropped[name] += int((passed & ~test).sum())
        passed &= test
    kept: list[np.ndarray] = [np.empty(0, np.int64)]
    rows = np.flatnonzero(passed)
    bounds = np.searchsorted(pairs[rows], np.arange(len(facts) + 1))  # a run goes by query
    # The same pair gets the same sample, wherever it lies.
    names = (facts["query_key"].to_numpy() ^ facts["text_key"].to_numpy()) >> np.uint64(1)
    for pair in range(len(facts)):
        own_rows = rows[bounds[pair] : bounds[pair + 1]]
        order = rules.look_order(ranks[own_rows], int(names[pair]))
        kept.append(own_rows[order[: _SPARE * rules.num_negatives]])
        dropped["not_needed"] += max(0, len(own_rows) - _SPARE * rules.num_negatives)
    return found.take(pa.array(np.concatenate(kept))), positive_ranks, dropped


def wanted_documents(storage: Storage, path: str) -> np.ndarray:
    """Return the hashes of the documents that a stored choice names, each once."""
    candidates = read_partial(storage, path)
    return np.unique(stable_hashes(candidates["doc_id"])) if len(candidates) else _NO_HASHES


_NO_HASHES = np.empty(0, np.uint64)


def read_unit_texts(batch: pa.Table, *, task: MiningTask, files: TextFiles) -> pa.Table:
    """Turn a planned unit into its pairs, and its candidates with their texts."""
    started = time.perf_counter()
    unit_key = batch["unit_key"][0].as_py()
    unit = MiningUnit.from_json(batch["spans"][0].as_py())
    rows = _own_pairs(unit, task)
    storage = Storage(task.output)
    candidates = read_partial(storage, files.choices[unit_key])
    metadata = candidates.schema.metadata or {}
    dropped = Counter(json.loads(metadata[b"dropped"]))
    positive_ranks = pa.array(json.loads(metadata[b"positive_ranks"]), pa.int32())
    texts = _read_texts(storage, files, files.parts[unit_key])
    places = pc.index_in(candidates["doc_id"], texts["id"].combine_chunks())
    dropped["missing_document"] += places.null_count
    candidates = candidates.append_column("text", texts["text"].take(places))
    candidates = candidates.filter(pc.is_valid(places))
    scores = np.empty(0, np.float32)
    if unit.vectors is not None:
        facts = _read_listed(task.vectors_uri, unit.vectors, ["positive_score"])
        scores = facts["positive_score"].to_numpy()[unit.start : unit.stop]
    stats = {
        "rows_in": rows.rows_in,
        "dropped": dropped,
        "seconds": {"read": time.perf_counter() - started},
    }
    return unit_row(
        unit_key,
        stats,
        pairs=rows.pairs.append_column("positive_score", pa.array(scores)).append_column(
            "positive_rank", positive_ranks
        ),
        rejects=rows.rejects,
        candidates=candidates.append_column("judged", pa.nulls(len(candidates), pa.float32())),
    )


def _read_texts(storage: Storage, files: TextFiles, part: int) -> pa.Table:
    def read(file: tuple[str, int]) -> pa.Table:
        found = find_segment(storage, *file, number=part, count=len(files.parts))
        return table_of(read_segment(storage, found))

    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="texts") as pool:
        tables = list(pool.map(read, files.paths))
    return pa.concat_tables(tables)


class JudgeActor:
    """Holds a reranker; gives each candidate its score, from 0 to 1."""

    def __init__(self, task: MiningTask, num_threads: int) -> None:
        stage = task.judge
        if stage is None:
            raise ValueError("there is no judge in this task")
        self._scorer = stage.spec.scorer
        self._reranker = RerankerConfig(
            model_path=resolve_model(stage.model, stage.revision),
            scorer=stage.spec.scorer,
            dtype=task.dtype,
            max_tokens=stage.max_tokens,
            token_budget=task.token_budget,
            num_threads=num_threads,
            instruction=stage.instruction,
        ).build()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fill the column ``judged`` of one unit's candidates; NaN where there is no number."""
        started = time.perf_counter()
        pairs, candidates = unit_table(batch, "pairs"), unit_table(batch, "candidates")
        numbers = candidates["pair"].to_numpy()
        texts = candidates["text"].to_pylist()
        changes = np.flatnonzero(np.diff(numbers)) + 1
        bounds = (
            np.concatenate([[0], changes, [len(numbers)]]) if len(numbers) else np.zeros(1, int)
        )
        queries = pairs.select(["query", "instruction"]).take(pa.array(numbers[bounds[:-1]]))
        groups = [
            CandidateGroup(
                query=row["query"],
                documents=texts[start:stop],
                instruction=row["instruction"] if self._scorer == "yes-no" else None,
            )
            for row, start, stop in zip(queries.to_pylist(), bounds[:-1], bounds[1:], strict=True)
        ]
        keys = np.concatenate([np.empty(0, np.float32), *self._reranker.score(groups)])
        judged = pa.array(scores_from_keys(keys, self._scorer))
        place = candidates.schema.get_field_index("judged")
        stats = json.loads(batch["stats"][0].as_py())
        stats["seconds"]["judge"] = time.perf_counter() - started
        return unit_row(
            batch["unit_key"][0].as_py(),
            stats,
            pairs=pairs,
            rejects=unit_table(batch, "rejects"),
            candidates=candidates.set_column(place, "judged", judged),
        )


def write_mined(batch: pa.Table, *, task: MiningTask, positive_texts: object) -> pa.Table:
    """Write one unit's rejects, then its pairs with negatives; return its row of OUTPUTS as JSON.

    Args:
        batch: From ``read_unit_texts``, perhaps by way of the judge.
        task: Shared by all.
        positive_texts: Reference to the Positives by text.
    """
    unit_key = batch["unit_key"][0].as_py()
    stats = json.loads(batch["stats"][0].as_py())
    pairs, rejects = unit_table(batch, "pairs"), unit_table(batch, "rejects")
    candidates = unit_table(batch, "candidates")
    dropped = Counter(stats["dropped"])
    positives = ray.get(cast("ray.ObjectRef[Positives]", positive_texts))
    chosen = _choose(pairs, candidates, task, positives, dropped)
    is_lost, lost = _reject_lost(pairs, task.rules)
    rejects = pa.concat_tables([rejects, lost])
    table = _with_negatives(pairs, candidates, chosen).filter(pa.array(~is_lost))
    storage = Storage(task.output)
    mined = [len(rows) for rows, is_bad in zip(chosen, is_lost, strict=True) if not is_bad]
    record = {
        "unit_key": unit_key,
        "fingerprint": task.fingerprint,
        "counts": {
            **unit_counts(stats["rows_in"], len(table), rejects, "pairs"),
            "negatives": sum(mined),
            "without_negatives": mined.count(0),
            "dropped_candidates": {name: n for name, n in sorted(dropped.items()) if n},
        },
        "rejects": write_rejects(storage, unit_key, rejects),
    }
    output = write_unit_file(storage, record, table)
    return pa.table({"output": [json.dumps(output)], "stats": [json.dumps(stats)]})


def _reject_lost(pairs: pa.Table, rules: NegativeRules) -> tuple[np.ndarray, pa.Table]:
    """Return which pairs do not stay, and schema.REJECTS of those."""
    ranks = pairs["positive_rank"].to_numpy()
    is_finite = np.isfinite(pairs["positive_score"].to_numpy())
    is_lost = ~is_finite | ~rules.finds_positive(ranks)
    places = np.flatnonzero(is_lost)
    reasons = [LOW_RANK if is_finite[place] else NON_FINITE_VECTOR for place in places]
    details = {
        LOW_RANK: "at least {} documents score above its own, --max-positive-rank={} is asked for",
        NON_FINITE_VECTOR: "the model gave NaN or infinity for its query or document",
    }
    told = [
        details[reason].format(ranks[place] - 1, rules.max_positive_rank)
        for place, reason in zip(places, reasons, strict=True)
    ]
    return is_lost, reject_pairs(pairs.take(pa.array(places)), reasons, told)


def _choose(
    pairs: pa.Table,
    candidates: pa.Table,
    task: MiningTask,
    positive_texts: Positives,
    dropped: Counter[str],
) -> list[list[int]]:
    """Return the rows of the candidates that become negatives of each pair."""
    numbers = candidates["pair"].to_numpy()
    texts = text_keys(candidates["text"].to_pylist())
    queries = text_keys(pairs["query"].to_pylist())
    given = [set(text_keys(row or [])) for row in pairs["negatives"].to_pylist()]
    is_positive = positive_texts.contain(queries[numbers], texts)
    judged = candidates["judged"].to_numpy(zero_copy_only=False)
    is_false = np.zeros(len(numbers), bool)
    if task.judge is not None:
        is_false = ~(judged <= task.max_judge_score)
    chosen: list[list[int]] = [[] for _ in range(len(pairs))]
    for row, (pair, text) in enumerate(zip(numbers.tolist(), texts.tolist(), strict=True)):
        if is_positive[row]:
            dropped["positive_text"] += 1
        elif text in given[pair]:
            dropped["repeated_text"] += 1
        elif is_false[row]:
            dropped["judge"] += 1
        elif len(chosen[pair]) == task.rules.num_negatives:
            dropped["not_needed"] += 1
        else:
            chosen[pair].append(row)
            given[pair].add(text)
    return chosen


def _with_negatives(
    pairs: pa.Table, candidates: pa.Table, chosen: Sequence[Sequence[int]]
) -> pa.Table:
    """Return TRAINING_PAIRS, mined negatives after those that were given, and kept columns."""
    ids, texts = candidates["doc_id"].to_pylist(), candidates["text"].to_pylist()
    rows = pairs.select(["negatives", "negative_ids"]).to_pylist()
    negatives, negative_ids = [], []
    for row, own in zip(rows, chosen, strict=True):
        given = row["negatives"] or []
        negatives.append([*given, *(texts[i] for i in own)])
        negative_ids.append([*(row["negative_ids"] or [None] * len(given)), *(ids[i] for i in own)])
    for name, values in (("negatives", negatives), ("negative_ids", negative_ids)):
        place = pairs.schema.get_field_index(name)
        field = TRAINING_PAIRS.field(name)
        pairs = pairs.set_column(place, field, pa.array(values, field.type))
    travelling = [*(field.name for field in PAIRS_IDENTITY), "positive_score", "positive_rank"]
    pairs = pairs.drop_columns(travelling)
    further = list(pairs.schema)[len(TRAINING_PAIRS) :]
    return pairs.cast(pa.schema([*TRAINING_PAIRS, *further]))
