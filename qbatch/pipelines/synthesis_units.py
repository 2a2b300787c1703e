"""The stages of synthesis: documents, then a language model's queries for them, then pairs.

One Ray row carries one unit, as in the embed pipeline.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.rows import RAW_LIMIT
from qbatch.corpus.spans import Unit
from qbatch.manifest import fingerprint_id
from qbatch.models.chat import ChatEngine, ChatReply, ChatRequest, ChatServer
from qbatch.models.hub import resolve_model
from qbatch.models.server import ServerConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.embed_forward import build_embedder
from qbatch.pipelines.embed_task import EmbedTask, unit_row, unit_table
from qbatch.pipelines.pair_source import unit_counts
from qbatch.pipelines.rerank_sources import full_texts
from qbatch.pipelines.unit_files import write_rejects, write_unit_file
from qbatch.schema import REJECTS, TRAINING_PAIRS, ComputeDtype
from qbatch.storage import Storage
from qbatch.training.synthesis import (
    CUT_RESPONSE,
    INSTRUCTIONS,
    Configuration,
    ResponseError,
    TaskKind,
    Wish,
    configuration_prompt,
    parse_configuration,
    parse_text,
    sample_configuration,
    text_prompt,
)

NUM_CHARACTERS = 5
"""Candidates the model chooses from, as in the report."""

FURTHER = pa.schema(
    [
        pa.field("question_type", pa.string()),
        pa.field("difficulty", pa.string()),
        pa.field("character", pa.string()),
        pa.field("language", pa.string()),
    ]
)
"""Columns after TRAINING_PAIRS: how a pair was asked for; null for kinds without."""

_DRAFT = pa.schema([("document", pa.int32()), ("number", pa.int32()), ("language", pa.string())])


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalModel:
    """A generator that runs in the actors; each process resolves it where it runs."""

    model: str
    revision: str | None
    dtype: ComputeDtype
    token_budget: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """A language of the texts to be written."""

    name: str
    """In English; "" is the language of the passage."""
    weight: float
    quota: int | None = None
    """Most pairs in this language, in all units together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisTask:
    """What every process of a job needs to know; it travels, models do not."""

    corpus: CorpusConfig
    output: str
    kind: TaskKind
    plain: bool
    languages: tuple[Language, ...]
    pairs_per_document: int
    fraction: float
    """Share of the documents that get pairs."""
    max_chars: int
    """Of a passage that the model sees."""
    max_attempts: int
    """Answers asked for before a document is given up."""
    max_answer_tokens: int
    temperature: float
    top_p: float
    instruction: str | None
    seed: int
    engine: ServerConfig | LocalModel
    persona_embedder: EmbedTask | None
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisUnit:
    """A unit of documents, and how many pairs of each language it may make."""

    unit: Unit
    quotas: tuple[int | None, ...]

    def key(self, fingerprint: str) -> str:
        """Return the name of this unit's output; quotas count only where there are any."""
        key = self.unit.key(fingerprint)
        if all(quota is None for quota in self.quotas):
            return key
        return fingerprint_id({"unit": key, "quotas": self.quotas})

    def to_json(self) -> str:
        """Return the unit for a plan."""
        return json.dumps({"unit": self.unit.to_json(), "quotas": self.quotas})

    @classmethod
    def from_json(cls, text: str) -> "SynthesisUnit":
        """Return the unit that ``to_json`` wrote."""
        fields = json.loads(text)
        return cls(unit=Unit.from_json(fields["unit"]), quotas=tuple(fields["quotas"]))


def seed_of(*parts: object) -> int:
    """Return 63 bits that follow from the parts alone."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def read_documents(batch: pa.Table, *, task: SynthesisTask) -> pa.Table:
    """Turn a planned unit into documents, and which pairs are to be made of them."""
    started = time.perf_counter()
    unit_key = batch["unit_key"][0].as_py()
    planned = SynthesisUnit.from_json(batch["spans"][0].as_py())
    rows = read_unit(planned.unit, task.corpus)
    dropped = Counter[str]()
    drafts = plan_pairs(len(rows.documents), unit_key, planned.quotas, task, dropped)
    documents = pa.table(
        {
            "object_uri": rows.documents["object_uri"].cast(pa.string()),
            "row": rows.documents["row"],
            "doc_id": rows.documents["doc_id"],
            "document": full_texts(rows.documents),
        }
    )
    stats = {
        "rows_in": rows.rows_in,
        "dropped": dropped,
        "seconds": {"read": time.perf_counter() - started},
    }
    return unit_row(unit_key, stats, documents=documents, rejects=rows.rejects, drafts=drafts)


def plan_pairs(
    num_documents: int,
    unit_key: str,
    quotas: Sequence[int | None],
    task: SynthesisTask,
    dropped: Counter[str],
) -> pa.Table:
    """Return which pairs are to be made: document, number among its pairs, and language.

    Documents are drawn with the task's fraction, languages by weight among those whose quota is not
    used up; a document for which there is neither is dropped, and counted.
    """
    left = [np.inf if quota is None else quota for quota in quotas]
    rows: list[tuple[int, int, str]] = []
    for document in range(num_documents):
        rng = np.random.default_rng([task.seed, seed_of(unit_key, document)])
        if rng.random() >= task.fraction:
            dropped["not_sampled"] += 1
            continue
        before = len(rows)
        for number in range(task.pairs_per_document):
            weights = [
                language.weight if room > 0 else 0.0
                for language, room in zip(task.languages, left, strict=True)
            ]
            if not any(weights):
                break
            chances = np.array(weights) / sum(weights)
            choice = int(rng.choice(len(weights), p=chances))
            left[choice] -= 1
            rows.append((document, number, task.languages[choice].name))
        if len(rows) == before:
            dropped["quota"] += 1
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _DRAFT, strict=True)], _DRAFT)


@dataclass(slots=True)
class _Draft:
    """A pair on its way."""

    passage: str
    wish: Wish
    seed: int
    configuration: Configuration | None = None
    text: str | None = None
    reason: str | None = None
    """Of the last answer that could not be used; likewise the next two."""
    detail: str = ""
    raw: str = ""
    attempts: int = 0


@dataclass(slots=True)
class SynthesisStats:
    """What the engine was asked."""

    requests: int = 0
    retries: int = 0


class Synthesizer:
    """Asks an engine for configurations, then for texts; what cannot be used is asked again."""

    def __init__(self, engine: ChatEngine, task: SynthesisTask) -> None:
        self._engine = engine
        self._task = task
        self.stats = SynthesisStats()

    def write(self, passages: Sequence[str], wishes: Sequence[Wish]) -> list[_Draft]:
        """Return a draft of each pair: with its text, or with the reason why there is none."""
        drafts = [
            _Draft(passage=passage, wish=wish, seed=wish.seed)
            for passage, wish in zip(passages, wishes, strict=True)
        ]
        task = self._task
        if task.plain or task.kind != "retrieval":
            for draft in drafts:
                draft.configuration = sample_configuration(draft.wish)
        else:
            self._ask(drafts, "configuration", _configure_prompt, _configure)
        ready = [draft for draft in drafts if draft.configuration is not None]
        self._ask(ready, "text", self._text_prompt, self._take_text)
        return drafts

    def _ask(
        self,
        drafts: Sequence[_Draft],
        stage: str,
        prompt: Callable[[_Draft], tuple[str, str]],
        take: Callable[[_Draft, str], None],
    ) -> None:
        pending = list(drafts)
        for attempt in range(self._task.max_attempts):
            if not pending:
                return
            requests = [self._request(draft, stage, attempt, prompt(draft)) for draft in pending]
            self.stats.requests += len(requests)
            self.stats.retries += len(requests) if attempt else 0
            replies = self._engine.complete(requests)
            for draft, reply in zip(pending, replies, strict=True):
                _receive(draft, reply, take, plain=self._task.plain)
            pending = [d for d in pending if d.reason is not None and not _is_final(d)]

    def _request(
        self, draft: _Draft, stage: str, attempt: int, prompt: tuple[str, str]
    ) -> ChatRequest:
        system, user = prompt
        return ChatRequest(
            system=system,
            user=user,
            seed=seed_of(draft.seed, stage, attempt),
            max_tokens=self._task.max_answer_tokens,
            temperature=self._task.temperature,
            top_p=self._task.top_p,
        )

    def _text_prompt(self, draft: _Draft) -> tuple[str, str]:
        if draft.configuration is None:
            raise ValueError("a text is asked for without a configuration")
        return text_prompt(
            self._task.kind, draft.passage, draft.wish, draft.configuration, plain=self._task.plain
        )

    def _take_text(self, draft: _Draft, answer: str) -> None:
        draft.text = parse_text(self._task.kind, answer, draft.passage, plain=self._task.plain)


def _configure_prompt(draft: _Draft) -> tuple[str, str]:
    return configuration_prompt(draft.passage, draft.wish)


def _configure(draft: _Draft, answer: str) -> None:
    draft.configuration = parse_configuration(answer, draft.wish)


_FINAL = frozenset({"request_refused", "request_failed", "prompt_too_long"})


def _is_final(draft: _Draft) -> bool:
    """Tell whether asking again is useless: the engine gave up by itself."""
    return draft.reason in _FINAL


def _receive(
    draft: _Draft, reply: ChatReply, take: Callable[[_Draft, str], None], *, plain: bool
) -> None:
    draft.attempts += 1
    draft.raw = reply.text
    if reply.reason is not None:
        draft.reason, draft.detail = reply.reason, reply.detail
        return
    try:
        if plain and reply.is_cut and "\n" not in reply.text.strip():
            raise ResponseError(CUT_RESPONSE, "the line goes on beyond the longest answer")
        take(draft, reply.text)
    except ResponseError as error:
        draft.reason = CUT_RESPONSE if reply.is_cut else error.reason
        draft.detail = str(error)
    else:
        draft.reason = None


class PersonaIndex:
    """Finds the people who are closest to a passage, by an embedder."""

    def __init__(self, task: EmbedTask, vectors: np.ndarray, num_threads: int | None) -> None:
        self._embedder = build_embedder(task, num_threads)
        path = resolve_model(task.model, task.revision)
        self._tokenizer = TextTokenizer.load(path, task.max_tokens, task.tokenizer)
        self._prompt = task.prompt
        self._vectors = vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors of people or passages alike: float32, (texts, dim)."""
        tokens = self._tokenizer.encode([self._prompt + text for text in texts])
        return self._embedder.embed(tokens.ids, tokens.lengths)

    def nearest(self, passages: Sequence[str]) -> np.ndarray:
        """Return the numbers of the closest people, best first: int64, (passages, at most 5)."""
        scores = self.embed(passages) @ self._vectors.T
        found: np.ndarray = np.argsort(-scores, axis=1, kind="stable")[:, :NUM_CHARACTERS]
        return found


def embed_personas(task: EmbedTask, personas: Sequence[str]) -> np.ndarray:
    """Return the vectors of people, made once for all actors."""
    nothing = np.empty((0, task.dims[0]), np.float32)
    return PersonaIndex(task, nothing, None).embed(personas)


class SynthesisActor:
    """Holds the engine, and an embedder if people are retrieved; writes the pairs of a unit."""

    def __init__(
        self,
        task: SynthesisTask,
        personas: Sequence[str],
        persona_vectors: np.ndarray | None,
        num_threads: int,
    ) -> None:
        self._task = task
        self._personas = list(personas)
        self._engine = build_engine(task.engine, num_threads)
        self._index = None
        if task.persona_embedder is not None and persona_vectors is not None:
            self._index = PersonaIndex(task.persona_embedder, persona_vectors, num_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add the drafts' texts, and what went wrong with those that have none."""
        started = time.perf_counter()
        unit_key = batch["unit_key"][0].as_py()
        documents, drafts = unit_table(batch, "documents"), unit_table(batch, "drafts")
        rows = drafts.to_pylist()
        texts = documents["document"].to_pylist()
        passages = [texts[row["document"]][: self._task.max_chars] for row in rows]
        seeds = [seed_of(self._task.seed, unit_key, row["document"], row["number"]) for row in rows]
        characters = self._characters(passages, seeds)
        wishes = [
            Wish(language=row["language"], characters=own, seed=seed)
            for row, own, seed in zip(rows, characters, seeds, strict=True)
        ]
        synthesizer = Synthesizer(self._engine, self._task)
        made = synthesizer.write(passages, wishes)
        stats = json.loads(batch["stats"][0].as_py())
        stats |= asdict(synthesizer.stats)
        stats["seconds"]["generate"] = time.perf_counter() - started
        return unit_row(
            unit_key,
            stats,
            documents=documents,
            rejects=unit_table(batch, "rejects"),
            drafts=_with_results(drafts, made, self._task),
        )

    def _characters(self, passages: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
        if self._index is not None and len(passages):
            return [[self._personas[i] for i in own] for own in self._index.nearest(passages)]
        size = min(NUM_CHARACTERS, len(self._personas))
        chosen = [
            np.random.default_rng([seed, 3]).choice(len(self._personas), size, replace=False)
            for seed in seeds
        ]
        return [[self._personas[i] for i in own] for own in chosen]


def build_engine(engine: ServerConfig | LocalModel, num_threads: int | None) -> ChatEngine:
    """Return what answers, in this process."""
    if isinstance(engine, ServerConfig):
        return ChatServer(engine)
    from qbatch.models.generator import GeneratorConfig  # noqa: PLC0415 - a server needs no torch

    return GeneratorConfig(
        model_path=resolve_model(engine.model, engine.revision),
        dtype=engine.dtype,
        token_budget=engine.token_budget,
        num_threads=num_threads,
    ).build()


def _with_results(drafts: pa.Table, made: Sequence[_Draft], task: SynthesisTask) -> pa.Table:
    has_types = task.kind == "retrieval"
    columns: dict[str, list[Any]] = {
        "text": [draft.text for draft in made],
        "reason": [draft.reason for draft in made],
        "detail": [f"{draft.detail} ({draft.attempts} answers)" for draft in made],
        "raw": [draft.raw.encode()[:RAW_LIMIT] for draft in made],
    }
    for name in ("question_type", "difficulty", "character"):
        columns[name] = [
            getattr(draft.configuration, name) if has_types and draft.configuration else None
            for draft in made
        ]
    for name, values in columns.items():
        data_type = pa.binary() if name == "raw" else pa.large_string()
        drafts = drafts.append_column(name, pa.array(values, data_type))
    return drafts


def write_pairs(batch: pa.Table, *, task: SynthesisTask) -> pa.Table:
    """Write one unit's rejects, then its pairs; return its row of OUTPUTS as JSON."""
    unit_key = batch["unit_key"][0].as_py()
    stats = json.loads(batch["stats"][0].as_py())
    documents, drafts = unit_table(batch, "documents"), unit_table(batch, "drafts")
    good = drafts.filter(pc.is_valid(drafts["text"]))
    used = set(good["document"].to_pylist())
    failed = {row["document"]: row for row in drafts.to_pylist() if row["document"] not in used}
    lost = documents.take(pa.array(list(failed), pa.int64()))
    rejects = pa.table(
        [
            lost["object_uri"],
            lost["row"],
            lost["doc_id"].cast(pa.string()),
            *(pa.array([row[name] for row in failed.values()]) for name in ("reason", "detail")),
            pa.array([row["raw"] for row in failed.values()], pa.binary()),
        ]
        if failed
        else [pa.array([], f.type) for f in REJECTS],
        names=REJECTS.names,
    ).cast(REJECTS)
    rejects = pa.concat_tables([unit_table(batch, "rejects"), rejects])
    storage = Storage(task.output)
    counts = unit_counts(
        stats["rows_in"], len(used), rejects, "documents", dropped=stats["dropped"]
    )
    record = {
        "unit_key": unit_key,
        "fingerprint": task.fingerprint,
        "counts": {
            **counts,
            "pairs": len(good),
            "requests": stats["requests"],
            "retries": stats["retries"],
        },
        "rejects": write_rejects(storage, unit_key, rejects),
    }
    output = write_unit_file(storage, record, pairs_table(documents, good, task))
    return pa.table({"output": [json.dumps(output)], "stats": [json.dumps(stats)]})


def pairs_table(documents: pa.Table, drafts: pa.Table, task: SynthesisTask) -> pa.Table:
    """Return TRAINING_PAIRS and FURTHER of the drafts that have a text.

    The passage is the document of a retrieval pair, and the query of all other kinds.
    """
    own = documents.take(drafts["document"])
    ids = own["doc_id"].to_pylist()
    names = [f"{i}#q{n}" for i, n in zip(ids, drafts["number"].to_pylist(), strict=True)]
    sides = {"query": drafts["text"], "document": own["document"]}
    doc_ids: list[str] | None = ids
    if task.kind != "retrieval":
        sides = {"query": own["document"], "document": drafts["text"]}
        doc_ids = None
    of_query, of_document = INSTRUCTIONS[task.kind]
    size = len(drafts)
    columns: dict[str, Any] = {
        "query_id": names,
        **sides,
        "doc_id": doc_ids or [None] * size,
        "instruction": [task.instruction or of_query] * size,
        "document_instruction": [(task.instruction or of_query) if of_document else None] * size,
        "task": [task.kind] * size,
        **{name: drafts[name] for name in ("question_type", "difficulty", "character")},
        "language": [language or None for language in drafts["language"].to_pylist()],
    }
    target = pa.schema([*TRAINING_PAIRS, *FURTHER])
    arrays = [
        pa.chunked_array([pa.nulls(size, f.type)])
        if f.name not in columns
        else columns[f.name].cast(f.type)
        if isinstance(columns[f.name], pa.ChunkedArray)
        else pa.chunked_array([pa.array(columns[f.name], f.type)])
        for f in target
    ]
    return pa.table(arrays, schema=target)
