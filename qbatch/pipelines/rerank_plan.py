"""The join as a whole, run from the driver: shuffle, join, and the units that come out.

Everything lies in ``join/`` under the output, each file named by what it was made from, so a job
that was killed, or one over the same inputs, makes only what is missing. The driver holds names,
sizes and one line a unit; no ids and no texts.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.units import plan_units
from qbatch.manifest import fingerprint_id
from qbatch.pipelines.cluster import MAX_RETRIES
from qbatch.pipelines.rerank_join import JoinInputs, RerankUnit, join_part, stored_units
from qbatch.pipelines.rerank_shuffle import (
    collect_wanted,
    shuffle_candidates,
    shuffle_documents,
    shuffle_queries,
)
from qbatch.pipelines.rerank_sources import CandidateSource
from qbatch.pipelines.tasks import results_as_completed
from qbatch.storage import Storage

log = logging.getLogger(__name__)

_DIRECTORY = "join"
_FORMAT = 1
"""Part of every name: raise it when what lies in ``join/`` changes."""

_UNITS_PER_TASK = 16
"""Units of the corpus that one task reads: it writes a segment for each part, small or not."""

_PART_BYTES = {"run": 2**20, "long": 32 * 2**20, "nested": 32 * 2**20}
"""Bytes of input that one part of the join is meant to have: some 50,000 candidates of a run."""

_MAX_PARTS = 4096

_Files = list[tuple[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinPlan:
    """What is joined, and how fine."""

    source: CandidateSource
    queries: CorpusConfig | None
    """None: the candidates bring their texts."""
    corpus: CorpusConfig | None
    num_parts: int | None
    """None suits the size of the candidates."""
    unit_pairs: int


@dataclass(kw_only=True, slots=True)
class Joined:
    """What came out."""

    units: list[RerankUnit]
    """The largest first, so that none of these is left over at the end; then by content."""
    input_id: str
    """Stands for the candidates and everything joined to them."""


def join_candidates(storage: Storage, plan: JoinPlan, *, stall_timeout_s: float) -> Joined:
    """Bring candidates and texts together, as far as that was not done before.

    Raises:
        NoInputError: There are no candidates, queries or documents.
        SourceChangedError: An input changed meanwhile.
    """
    join = _Join(storage, plan, stall_timeout_s)
    parts = list(plan.source.parts())
    num_parts = plan.num_parts or _suited_parts(sum(size for _, size in parts), plan.source.kind)
    candidates = join.make(
        "candidates",
        [part for part, _ in parts],
        {"source": _reading(plan.source.corpus), "kind": plan.source.kind, "parts": num_parts}
        | {"columns": asdict(plan.source.columns), "query": plan.source.query_column},
        shuffle_candidates,
        source=plan.source,
        num_parts=num_parts,
    )
    queries, documents = join.texts(candidates, num_parts)
    inputs = JoinInputs(
        candidates=tuple(candidates),
        queries=tuple(queries),
        documents=tuple(documents),
        num_parts=num_parts,
        has_texts=plan.source.has_texts,
    )
    input_id = fingerprint_id(asdict(inputs) | {"unit_pairs": plan.unit_pairs, "format": _FORMAT})
    units = join.parts(inputs, input_id)
    log.info(
        "joined %s candidates in %d parts to %d units",
        *(f"{sum(unit.pairs for unit in units):,}", num_parts, len(units)),
    )
    units.sort(key=lambda unit: (-unit.pairs, unit.content))
    return Joined(units=units, input_id=input_id)


def _suited_parts(num_bytes: int, kind: str) -> int:
    """Return a power of two: an input that grows a little keeps its parts."""
    wanted = min(_MAX_PARTS, num_bytes // _PART_BYTES[kind])
    return 1 << (int(wanted).bit_length() - 1 if wanted else 0)


def _reading(corpus: CorpusConfig) -> dict[str, Any]:
    return {**corpus.fingerprint(), "format": corpus.format}


@dataclass(slots=True)
class _Join:
    """The steps, each of which makes the files that are not there yet."""

    storage: Storage
    plan: JoinPlan
    stall_timeout_s: float
    existing: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.existing = {o.path: o.size for o in self.storage.iter_objects(_DIRECTORY)}

    def make(
        self,
        kind: str,
        pieces: Sequence[Any],
        settings: dict[str, Any],
        work: Callable[..., None],
        **shared: object,
    ) -> _Files:
        """Return path and size of the file of each piece, after making those that are missing.

        Args:
            kind: Directory of the files.
            pieces: What one file is made from.
            settings: What else changes the content of a file.
            work: Writes one file.
            shared: Goes to all calls of ``work``; object references as what they stand for.
        """
        names = [
            fingerprint_id({"kind": kind, "piece": piece, "format": _FORMAT, **settings})
            for piece in pieces
        ]
        paths = [f"{_DIRECTORY}/{kind}/{name}.segments" for name in names]
        missing = [i for i, path in enumerate(paths) if path not in self.existing]
        task = ray.remote(max_retries=MAX_RETRIES)(_make)
        refs = [task.remote(work, self.storage, paths[i], pieces[i], **shared) for i in missing]
        log.info("%s: %d files, %d of them to be made", kind, len(paths), len(missing))
        for path, size in results_as_completed(refs, stall_timeout_s=self.stall_timeout_s):
            self.existing[path] = size
        return [(path, self.existing[path]) for path in paths]

    def texts(self, candidates: _Files, num_parts: int) -> tuple[_Files, _Files]:
        """Return the files of queries and of documents; none if the candidates bring their own."""
        queries, corpus = self.plan.queries, self.plan.corpus
        if queries is None or corpus is None:
            return [], []
        query_files = self.make(
            "queries",
            list(_grouped_units(queries)),
            {"reading": _reading(queries), "parts": num_parts},
            shuffle_queries,
            queries=queries,
            num_parts=num_parts,
        )
        # Made even if it turns out that no file is missing: that costs one read of small segments.
        wanted = ray.remote(max_retries=MAX_RETRIES)(collect_wanted).remote(
            self.storage, candidates, num_parts
        )
        document_files = self.make(
            "documents",
            list(_grouped_units(corpus)),
            {"reading": _reading(corpus), "parts": num_parts, "candidates": candidates},
            shuffle_documents,
            corpus=corpus,
            wanted=wanted,
            num_parts=num_parts,
        )
        return query_files, document_files

    def parts(self, inputs: JoinInputs, input_id: str) -> list[RerankUnit]:
        """Return the units of all parts."""
        shared = ray.put(inputs)
        join = ray.remote(max_retries=MAX_RETRIES)(_join_part)
        refs = []
        for part in range(inputs.num_parts):
            path = (
                f"{_DIRECTORY}/units/{fingerprint_id({'input': input_id, 'part': part})}.segments"
            )
            size = self.existing.get(path)
            refs.append(join.remote(self.storage, path, part, shared, self.plan.unit_pairs, size))
        results = results_as_completed(refs, stall_timeout_s=self.stall_timeout_s)
        return [unit for units in results for unit in units]


def _grouped_units(corpus: CorpusConfig) -> Iterator[list[str]]:
    group: list[str] = []
    for unit in plan_units(corpus):
        group.append(unit.to_json())
        if len(group) == _UNITS_PER_TASK:
            yield group
            group = []
    if group:
        yield group


def _make(
    work: Callable[..., None], storage: Storage, path: str, piece: object, **shared: object
) -> tuple[str, int]:
    work(storage, path, piece, **shared)
    return path, storage.info(path).size


def _join_part(
    storage: Storage,
    path: str,
    part: int,
    inputs: JoinInputs,
    unit_pairs: int,
    size: int | None,
) -> list[RerankUnit]:
    if size is not None:
        return stored_units(storage, path, size)
    return join_part(storage, path, part, inputs, unit_pairs)
