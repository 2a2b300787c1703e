"""The mining job: pairs get hard negatives from an index, and become a published table.

embed pairs as the index was -> search -> choose candidates -> fetch their texts -> a reranker drops
false negatives, if there is one -> write one file a block of pairs -> check that every pair is
accounted for -> publish. Killed anywhere, it goes on where it stopped.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qbatch.cli import StrList
from qbatch.corpus.config import CorpusConfig, Format
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.spans import Unit
from qbatch.corpus.units import plan_units
from qbatch.errors import ConfigError
from qbatch.manifest import (
    Generation,
    fingerprint_id,
    latest_generation,
    publish_change,
    read_verified,
)
from qbatch.models.rerank_templates import ScorerName
from qbatch.pipelines.cluster import MAX_RETRIES, PoolPlan, ray_session
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.embed_resume import Plan, draft_of_units
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.negative_search import (
    IndexModel,
    collect_positives,
    embed_queries,
    scoring_task,
)
from qbatch.pipelines.negative_units import (
    JudgeActor,
    MiningTask,
    MiningUnit,
    TextFiles,
    choose_candidates,
    read_unit_texts,
    wanted_documents,
    write_mined,
)
from qbatch.pipelines.pair_source import PairSource, pair_source
from qbatch.pipelines.rerank_cascade import LastModel, make_stages, parse_cascade, stage_fingerprint
from qbatch.pipelines.rerank_shuffle import Wanted, shuffle_documents
from qbatch.pipelines.search_index import SearchIndexConfig, open_index_table, search_index
from qbatch.pipelines.search_queries import QueryBlock
from qbatch.pipelines.tasks import results_as_completed
from qbatch.pipelines.unit_files import OUTPUTS, list_partials
from qbatch.pipelines.unit_job import UnitJobConfig
from qbatch.pipelines.unit_stream import Stages, run_stages
from qbatch.report.writing import write_report
from qbatch.schema import SCHEMA_VERSION, ComputeDtype
from qbatch.storage import Storage, probe
from qbatch.tables import PublishedTable, open_table
from qbatch.training.negatives import NegativeRules, Positives, Sampling

log = logging.getLogger(__name__)

_UNITS_PER_TASK = 4

_BLOCK_UNITS = 1
"""Units of a Ray block: each holds thousands of pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MineNegativesConfig(UnitJobConfig):
    """Give training pairs hard negatives: documents found for the query that do not answer it."""

    pairs: str
    """Published pairs table, or Parquet, JSON lines or CSV with the columns query and document."""
    index: str
    """Published index of the corpus, from build_index.py."""
    corpus: str
    """Texts of the indexed documents, in any corpus format."""
    output: str
    """Directory of the pairs table with negatives."""
    index_generation: int | None = None
    """Which generation of the index is searched; None is the newest."""
    model: str | None = None
    """Where the index's model lies here; None is where it lay when the corpus was embedded."""
    revision: str | None = None
    """Commit of a hub id."""
    instruction: str | None = None
    """Task sentence of queries whose pair names none; None is the model's own."""
    num_negatives: int = 7
    """Negatives mined for a pair, at most; they come after those it has."""
    first_rank: int = 1
    """Best rank that is looked at: higher ones hold more false negatives."""
    last_rank: int = 100
    """Worst rank that is looked at: lower ones are easy."""
    max_ratio: float | None = 0.95
    """A negative scores below this share of the positive's score (TopK-PercPos of NV-Retriever);
    --max-ratio None for no such rule."""
    margin: float | None = None
    """A negative scores below the positive's score minus this (TopK-MarginPos)."""
    max_positive_rank: int | None = None
    """A pair is dropped unless its positive is among this many best of the index (round-trip
    consistency, as in Promptagator); None keeps all."""
    sampling: Sampling = "random"
    """Which of the eligible: a seeded random choice, or those with the best ranks."""
    seed: int = 0
    """Of the random choice."""
    rescore: int = 0
    """Exact scores from the stored vectors for this many times --last-rank candidates of each
    shard; the index's own scores are too rough for margins where it compresses vectors."""
    nprobe: int | None = None
    """Inverted lists visited; None is what the build found necessary."""
    judge: str | None = None
    """Reranker that drops false negatives: directory or hub id."""
    judge_revision: str | None = None
    """Commit of a hub id."""
    judge_scorer: Literal["auto"] | ScorerName = "auto"
    """How the judge scores; auto goes by the checkpoint."""
    max_judge_score: float = 0.5
    """Candidates that the judge scores above are dropped; scores are 0 to 1."""
    format: Format = "auto"
    """How to read --pairs; auto goes by names."""
    corpus_format: Format = "auto"
    """How to read --corpus."""
    id_column: str = "doc_id"
    """Column of the document's id in --corpus."""
    text_column: str = "text"
    """Column of its text."""
    title_column: str | None = None
    """Column of a title that goes before the text; None for none."""
    keep_columns: StrList = ()
    """Further columns of the pairs to carry to the output."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype of the judge; the embedder's is that of the index."""
    token_budget: int | None = None
    """Tokens in one forward pass of the judge; None suits the device."""
    unit_bytes: int = 16 * 2**20
    """Aimed size of a unit of work in bytes of input."""
    dry_run: bool = False
    """Print the plan; start nothing."""

    def __post_init__(self) -> None:
        UnitJobConfig.__post_init__(self)
        if not 0 <= self.max_judge_score <= 1:
            raise ConfigError(f"max_judge_score is {self.max_judge_score}; give 0 to 1")
        self.rules()

    def rules(self) -> NegativeRules:
        """Return the rules of mining."""
        return NegativeRules(
            first_rank=self.first_rank,
            last_rank=self.last_rank,
            max_ratio=self.max_ratio,
            margin=self.margin,
            max_positive_rank=self.max_positive_rank,
            num_negatives=self.num_negatives,
            sampling=self.sampling,
            seed=self.seed,
        )

    def source(self) -> PairSource:
        """Look at the pairs; return how they are read."""
        return pair_source(
            self.pairs,
            file_format=self.format,
            keep_columns=self.keep_columns,
            unit_bytes=self.unit_bytes,
        )

    def documents(self) -> CorpusConfig:
        """Return how texts are read."""
        return resolve_config(
            CorpusConfig(
                input=self.corpus,
                format=self.corpus_format,
                id_column=self.id_column,
                text_column=self.text_column,
                title_column=self.title_column,
            )
        )

    def search(self) -> SearchIndexConfig:
        """Return how the index is searched with the vectors of the pairs' queries."""
        return SearchIndexConfig(
            index=self.index,
            index_generation=self.index_generation,
            queries=f"{self.output.rstrip('/')}/query-vectors",
            output=f"{self.output.rstrip('/')}/run",
            top_k=self.last_rank,
            nprobe=self.nprobe,
            rescore=self.rescore,
            stall_timeout_s=self.stall_timeout_s,
            single_writer=self.single_writer,
        )


def mine_negatives(config: MineNegativesConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    index = open_index_table(config.index, config.index_generation)
    source = config.source()
    if config.dry_run:
        units = list(source.plan_units())
        return {"dry_run": True, "units": len(units), "indexed": index.generation.counts["ntotal"]}
    storage = Storage(config.output, single_writer=config.single_writer)
    probe(storage)
    current = latest_generation(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s):
        job = _Mining.start(config, source, index, storage)
        found = job.search()
        searched_at = time.perf_counter()
        outputs, plan, num_made, settings = job.mine(found, current)
    counts = total_counts(outputs)
    config.check_counts(counts, "pairs")
    draft = draft_of_units(
        storage,
        plan,
        outputs,
        kind="pairs",
        fingerprint=settings,
        config=asdict(config),
        counts=counts,
    )
    published = publish_change(storage, draft, current)
    summary = {
        "generation": published.number,
        **counts,
        "units_made": num_made,
        "units_reused": len(plan) - num_made,
        "seconds": {
            "search": round(searched_at - started, 3),
            "total": round(time.perf_counter() - started, 3),
        },
    }
    write_report(storage, "pairs", summary)
    return summary


def total_counts(outputs: pa.Table) -> dict[str, Any]:
    """Add up the counts of all units."""
    totals: Counter[str] = Counter()
    nested: dict[str, Counter[str]] = {"rejected": Counter(), "dropped_candidates": Counter()}
    for text in outputs["counts"]:
        counts = json.loads(text.as_py())
        for name, total in nested.items():
            total.update(counts.pop(name))
        totals.update(counts)
    names = ("rows_in", "rows_out", "negatives", "without_negatives")
    sums = {name: totals[name] for name in names}
    return {**sums, **{name: dict(sorted(total.items())) for name, total in nested.items()}}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What the search leaves behind."""

    units: list[MiningUnit]
    positive_ids: Positives
    positive_texts: Positives
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mining:
    """What the steps of one job share."""

    config: MineNegativesConfig
    storage: Storage
    source: PairSource
    model: IndexModel
    pool: PoolPlan
    task: MiningTask
    judge: dict[str, Any] | None = field(default=None)
    """Fingerprint of the judge."""

    @classmethod
    def start(
        cls,
        config: MineNegativesConfig,
        source: PairSource,
        index: PublishedTable,
        storage: Storage,
    ) -> "_Mining":
        pool = config.pool()
        kept = index.generation.details["embedding"]
        fingerprint = index.generation.fingerprint
        model = IndexModel(
            model=config.model or kept["model"],
            revision=config.revision if config.model else kept["revision"],
            embedding=fingerprint["embedding"],
            dim=fingerprint["dim"],
        )
        stage, judge = None, None
        if config.judge is not None:
            last = LastModel(
                model=config.judge,
                revision=config.judge_revision,
                scorer=config.judge_scorer,
                max_tokens=None,
                instruction=None,
            )
            (stage,), (spec,) = make_stages(parse_cascade(()), last)
            judge = stage_fingerprint(stage, spec)
        search = config.search()
        task = MiningTask(
            output=config.output,
            vectors_uri=search.queries,
            run_uri=search.output,
            source=source,
            rules=config.rules(),
            judge=stage,
            max_judge_score=config.max_judge_score,
            dtype=compute_dtype(config.dtype, pool.gpus_per_actor) if stage else "float32",
            token_budget=config.token_budget,
        )
        return cls(
            config=config,
            storage=storage,
            source=source,
            model=model,
            pool=pool,
            task=task,
            judge=judge,
        )

    def search(self) -> _Found:
        """Embed the pairs and search; return the units of mining."""
        search = self.config.search()
        task, settings, vectors = scoring_task(
            self.source, self.model, search.queries, self.config.instruction
        )
        units = embed_queries(task, settings, vectors, self.pool)
        table = open_table(search.queries)
        positive_ids, positive_texts = collect_positives(table)
        search_index(search)
        return _Found(
            units=list(_mining_units(units, table, open_table(search.output))),
            positive_ids=positive_ids,
            positive_texts=positive_texts,
            settings={
                "schema_version": SCHEMA_VERSION,
                "scoring": settings,
                "rules": asdict(self.task.rules),
                "positives": [positive_ids.fingerprint(), positive_texts.fingerprint()],
            },
        )

    def mine(
        self, found: _Found, current: Generation | None
    ) -> tuple[pa.Table, Plan, int, dict[str, Any]]:
        """Make what is missing; return OUTPUTS of all units, plan, number made, fingerprint."""
        choices = self._choices(found)
        files = self._texts(choices)
        settings = {
            **found.settings,
            "judge": self.judge,
            "max_judge_score": self.config.max_judge_score if self.judge else None,
            "texts": fingerprint_id({"files": [path for path, _ in files]}),
        }
        task = replace(self.task, fingerprint=fingerprint_id(settings))
        plan = Plan(found.units, task.fingerprint)
        keys = plan.keys.to_pylist()
        text_files = TextFiles(
            paths=tuple(files),
            parts={key: part for part, key in enumerate(keys)},
            choices=dict(zip(keys, choices, strict=True)),
        )
        done = finished_units(self.storage, plan.keys, current)
        log.info("%d units planned, %d of them finished already", len(plan), len(done))
        made = list(self._make(plan, done, task, text_files, ray.put(found.positive_texts)))
        outputs = pa.concat_tables([done, pa.Table.from_pylist(made, schema=OUTPUTS)])
        return outputs, plan, len(made), settings

    def _choices(self, found: _Found) -> list[str]:
        """Return where the candidates of each unit are stored, choosing those that are not."""
        fingerprint = fingerprint_id(found.settings)
        keys = [unit.key(fingerprint) for unit in found.units]
        partials = list_partials(self.storage)
        choose = ray.remote(max_retries=MAX_RETRIES)(choose_candidates)
        shared = ray.put(self.task), ray.put(found.positive_ids)
        refs = [
            choose.remote(unit, key, *shared)
            for unit, key in zip(found.units, keys, strict=True)
            if key not in partials
        ]
        for _ in results_as_completed(refs, stall_timeout_s=self.config.stall_timeout_s):
            pass
        partials = list_partials(self.storage)
        return [partials[key] for key in keys]

    def _texts(self, choices: Sequence[str]) -> list[tuple[str, int]]:
        """Return path and size of files with the texts of all candidates, by unit."""
        read = ray.remote(max_retries=MAX_RETRIES)(wanted_documents)
        hashes = ray.get([read.remote(self.storage, path) for path in choices])
        numbers = [np.full(len(own), part, np.int32) for part, own in enumerate(hashes)]
        flat, parts = np.concatenate(hashes), np.concatenate(numbers)
        order = np.lexsort((parts, flat))
        wanted = ray.put(Wanted(hashes=flat[order], parts=parts[order]))
        corpus = self.config.documents()
        existing = {o.path: o.size for o in self.storage.iter_objects("join")}
        reading = {**corpus.fingerprint(), "format": corpus.format}
        files, refs = [], []
        write = ray.remote(max_retries=MAX_RETRIES)(_write_texts)
        for group in _grouped(plan_units(corpus)):
            made_from = {"units": group, "reading": reading, "choices": list(choices)}
            files.append(f"join/{fingerprint_id(made_from)}.segments")
            if files[-1] not in existing:
                refs.append(
                    write.remote(self.storage, files[-1], group, corpus, wanted, len(choices))
                )
        stall_timeout_s = self.config.stall_timeout_s
        existing |= dict(results_as_completed(refs, stall_timeout_s=stall_timeout_s))
        return [(path, existing[path]) for path in files]

    def _make(
        self, plan: Plan, done: pa.Table, task: MiningTask, files: TextFiles, positive_texts: object
    ) -> Iterator[dict[str, Any]]:
        if len(done) == len(plan):
            return
        stages = Stages(
            read=partial(read_unit_texts, task=task, files=files),
            actor=None if task.judge is None else JudgeActor,
            actor_arguments={"task": task, "num_threads": self.pool.threads_per_actor},
            write=partial(write_mined, task=task, positive_texts=positive_texts),
        )
        for told in run_stages(plan.iter_pending(done, _BLOCK_UNITS), stages, self.pool):
            yield json.loads(told["output"])


def _mining_units(
    units: Mapping[str, Unit], vectors: PublishedTable, run: PublishedTable
) -> Iterator[MiningUnit]:
    """Yield a unit for each block of the search, and one for each unit of bad pairs only."""
    data = read_verified(run.storage, run.generation.plan or {})
    blocks: dict[str, list[tuple[QueryBlock, tuple[str, str]]]] = {}
    for row in pq.read_table(pa.BufferReader(data)).to_pylist():
        block = QueryBlock.from_json(row["spans"])
        blocks.setdefault(block.path, []).append((block, (row["path"], row["sha256"])))
    for entry in vectors.generation.files.to_pylist():
        pairs = units[entry["path"]].to_json()
        own = sorted(blocks.get(entry["path"], []), key=lambda found: found[0].start)
        for block, file in own:
            yield MiningUnit(
                pairs=pairs,
                start=block.start,
                stop=block.stop,
                vectors=(entry["path"], entry["sha256"]),
                run=file,
            )
        if not own:
            yield MiningUnit(pairs=pairs, start=0, stop=0, vectors=None, run=None)


def _grouped(units: Iterator[Unit]) -> Iterator[list[str]]:
    group: list[str] = []
    for unit in units:
        group.append(unit.to_json())
        if len(group) == _UNITS_PER_TASK:
            yield group
            group = []
    if group:
        yield group


def _write_texts(
    storage: Storage,
    path: str,
    units: Sequence[str],
    corpus: CorpusConfig,
    wanted: Wanted,
    num_parts: int,
) -> tuple[str, int]:
    shuffle_documents(storage, path, units, corpus=corpus, wanted=wanted, num_parts=num_parts)
    return path, storage.info(path).size
