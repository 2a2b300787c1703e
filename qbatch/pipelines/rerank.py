"""The rerank job: candidates become a published run in the order of a reranker.

join candidates with their texts, in units of whole queries -> tokenize on CPU tasks -> score on a
pool of actors -> rank and write one file a unit -> check that every pair is accounted for ->
publish. Killed anywhere, it goes on where it stopped.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from qbatch.cli import StrList
from qbatch.corpus.config import CorpusConfig, Format
from qbatch.corpus.listing import resolve_config
from qbatch.errors import ConfigError
from qbatch.manifest import Generation, fingerprint_id, latest_generation, publish_change
from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.models.rerank_prompts import TEMPLATE_VERSION
from qbatch.models.rerank_templates import ScorerName
from qbatch.pipelines.cluster import PoolPlan, ray_session
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.embed_estimate import Prices
from qbatch.pipelines.embed_resume import Plan, draft_of_units
from qbatch.pipelines.engine import EngineConfig
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.metrics import UnitMetrics
from qbatch.pipelines.rerank_cascade import (
    LastModel,
    make_stages,
    parse_cascade,
    stage_fingerprint,
)
from qbatch.pipelines.rerank_estimate import estimate_reranking
from qbatch.pipelines.rerank_forward import RerankActor
from qbatch.pipelines.rerank_lists import NestedColumns
from qbatch.pipelines.rerank_plan import Joined, JoinPlan, join_candidates
from qbatch.pipelines.rerank_read import read_and_tokenize_pairs
from qbatch.pipelines.rerank_samples import sample_queries
from qbatch.pipelines.rerank_sources import candidate_source, run_source
from qbatch.pipelines.rerank_task import Fusion, RerankTask
from qbatch.pipelines.rerank_write import write_ranked
from qbatch.pipelines.unit_files import OUTPUTS
from qbatch.pipelines.unit_stream import Stages, make_units
from qbatch.report.ranking import reranked_details
from qbatch.report.rerank_progress import RerankProgress
from qbatch.report.writing import write_report
from qbatch.schema import SCHEMA_VERSION, ComputeDtype
from qbatch.storage import Storage, probe
from qbatch.tables import PublishedTable

log = logging.getLogger(__name__)

_BLOCK_UNITS = 20
"""Units of pairs are larger than those of a corpus: a block of many would keep actors waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankCandidatesConfig(EngineConfig):
    """Rerank candidates into a published run."""

    output: str
    """Directory of the reranked run."""
    model: str
    """Directory or hub id of the reranker, such as Qwen/Qwen3-Reranker-0.6B."""
    run: str | None = None
    """Published run, or a file or directory of files (TREC, Parquet, JSON lines); needs --queries
    and --corpus."""
    run_generation: int | None = None
    """Generation of a published run; None is the newest."""
    candidates: str | None = None
    """Parquet or JSON lines with texts, a pair a row or lists of documents; instead of --run."""
    queries: str | None = None
    """Texts of the run's queries, in any corpus format."""
    corpus: str | None = None
    """Texts of the run's documents, in any corpus format."""
    revision: str | None = None
    """Commit of a hub id; None is the pinned one of a known model."""
    instruction: str | None = None
    """Task sentence for yes-no models; None is the model card's."""
    scorer: Literal["auto"] | ScorerName = "auto"
    """How the model scores; auto goes by the checkpoint."""
    max_tokens: int | None = None
    """Longest pair, prompt included, beyond which documents are cut; None is the model's own limit,
    at most 8,192."""
    token_budget: int | None = None
    """Tokens in one forward pass; None suits the device."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype; auto is bfloat16 where the processor has it, else float32."""
    top_k: int | None = None
    """Documents of a query that are written; None is all."""
    cascade: StrList = ()
    """Cuts before --model: N keeps the best N of a query by retrieval rank, MODEL:N the best N by a
    smaller reranker; "200,small-model:50" does one after the other. What is cut is dropped."""
    fusion: Fusion = "none"
    """What ranks: none is the reranker alone; rrf adds 1/(60 + rank) of reranker and retrieval;
    weighted adds the reranker's score and the retrieval's, which is scaled to 0..1 per query."""
    fusion_weight: float = 0.5
    """Of the reranker in --fusion=weighted; the retrieval has the rest."""
    query_id_column: str = "query_id"
    """Column of the query's id, in --queries and --candidates."""
    query_column: str = "query"
    """Column of the query's text in --candidates."""
    query_text_column: str = "text"
    """Column of the query's text in --queries."""
    doc_id_column: str = "doc_id"
    """Column, or field of a list's structs, of the document's id."""
    text_column: str = "text"
    """Column, or field of a list's structs, of the document's text."""
    title_column: str | None = None
    """Column of a title that goes before the text; None for none."""
    rank_column: str = "rank"
    """Column of the retrieval's rank in --candidates."""
    score_column: str = "score"
    """Column of the retrieval's score in --candidates."""
    documents_column: str = "documents"
    """Column of a list of documents in --candidates; columns doc_ids, texts, ranks and scores that
    hold lists do as well (the names above with an s)."""
    format: Format = "auto"
    """How to read --candidates or --corpus; auto goes by names."""
    queries_format: Format = "auto"
    """How to read --queries."""
    unit_pairs: int = 1024
    """Most pairs of a unit of work; a query with more is a unit of its own."""
    num_partitions: int | None = None
    """Parts of the join of candidates and texts; None suits the size of the candidates."""
    gpu_hourly_price: float | None = None
    """Price of one GPU, or of one CPU machine without GPUs, for an hour; for --dry-run."""
    tokens_per_s: float | None = None
    """Speed of one actor for --dry-run; None measures it on this machine."""
    dry_run: bool = False
    """Print pairs, token histogram, time and cost; start nothing."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        for name in ("top_k", "unit_pairs", "num_partitions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give 1 or more")
        if not 0 <= self.fusion_weight <= 1:
            raise ConfigError(f"fusion_weight is {self.fusion_weight}; give 0 to 1")
        if (self.run is None) == (self.candidates is None):
            raise ConfigError(
                f"--run={self.run} and --candidates={self.candidates}: give exactly one of them"
            )
        texts = (self.queries, self.corpus)
        if (None in texts) if self.run is not None else texts != (None, None):
            raise ConfigError(
                f"--queries={self.queries} and --corpus={self.corpus}: --run needs both, "
                "--candidates brings its texts and takes neither"
            )
        parse_cascade(self.cascade)
        self.server_of(self.model, self.dtype)

    def columns(self) -> NestedColumns:
        """Return how the columns of candidates are called."""
        return NestedColumns(
            query_id=self.query_id_column,
            doc_id=self.doc_id_column,
            text=self.text_column,
            rank=self.rank_column,
            score=self.score_column,
            documents=self.documents_column,
        )

    def join_plan(self) -> JoinPlan:
        """Look at the inputs; return what is to be joined."""
        if self.run is not None and self.queries is not None and self.corpus is not None:
            source = run_source(self.run, self.columns(), self.run_generation)
            queries = CorpusConfig(
                input=self.queries,
                format=self.queries_format,
                id_column=self.query_id_column,
                text_column=self.query_text_column,
            )
            texts = [resolve_config(queries), resolve_config(self._documents(self.corpus))]
        else:
            documents = self._documents(str(self.candidates))
            source = candidate_source(documents, self.columns(), query_column=self.query_column)
            texts = []
        return JoinPlan(
            source=source,
            queries=texts[0] if texts else None,
            corpus=texts[1] if texts else None,
            num_parts=self.num_partitions,
            unit_pairs=self.unit_pairs,
        )

    def _documents(self, uri: str) -> CorpusConfig:
        return CorpusConfig(
            input=uri,
            format=self.format,
            id_column=self.doc_id_column,
            text_column=self.text_column,
            title_column=self.title_column,
        )


def rerank_candidates(config: RerankCandidatesConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    if config.dry_run:
        return _estimate(config, _make_task(config)[0])
    storage = Storage(config.output, single_writer=config.single_writer)
    probe(storage)
    current = latest_generation(storage)
    # As in embed_corpus: beside the start of Ray, never beside its stop.
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(_make_task, config)
        with ray_session(stall_timeout_s=config.stall_timeout_s):
            task, models = loading.result()
            pool = config.pool(needs_gpus=task.needs_models)
            task = replace(task, dtype=compute_dtype(config.dtype, pool.gpus_per_actor))
            settings = scoring_fingerprint(task, models)
            task = replace(task, fingerprint=fingerprint_id(settings))
            joined = join_candidates(
                storage, config.join_plan(), stall_timeout_s=config.stall_timeout_s
            )
            join_s = time.perf_counter() - started
            plan = Plan(joined.units, task.fingerprint)
            done = finished_units(storage, plan.keys, current)
            log.info("%d units planned, %d of them finished already", len(plan), len(done))
            progress = RerankProgress(len(plan) - len(done))
            reranked = _Reranked(
                config=config,
                storage=storage,
                current=current,
                settings=settings,
                joined=joined,
                join_s=join_s,
                plan=plan,
                done=done,
                made=list(_make_units(plan, done, task, pool, progress)),
                progress=progress,
            )
    return reranked.publish(started)


def _make_task(config: RerankCandidatesConfig) -> tuple[RerankTask, list[dict[str, Any]]]:
    """Look at the models; return what all processes need to know, and what each model is."""
    cascade = parse_cascade(config.cascade)
    last = LastModel(
        model=config.model,
        revision=config.revision,
        scorer=config.scorer,
        max_tokens=config.max_tokens,
        instruction=config.instruction,
        server=config.server_of(config.model, config.dtype),
    )
    stages, specs = make_stages(cascade, last)
    task = RerankTask(
        output=config.output,
        stages=tuple(stages),
        depth=cascade.depth,
        dtype="float32",
        token_budget=config.token_budget,
        top_k=config.top_k,
        fusion=config.fusion,
        fusion_weight=config.fusion_weight,
    )
    return task, [stage_fingerprint(s, spec) for s, spec in zip(stages, specs, strict=True)]


def _estimate(config: RerankCandidatesConfig, task: RerankTask) -> dict[str, Any]:
    config.check_foretold(config.tokens_per_s)
    device = resolve_device()
    gpus = config.gpus_per_actor
    prices = Prices(
        tokens_per_s=config.tokens_per_s,
        num_actors=config.max_actors or config.min_actors or 1,
        gpus_per_actor=float(device.type == "cuda") if gpus is None else gpus,
        gpu_hourly_price=config.gpu_hourly_price,
    )
    task = replace(task, dtype=resolve_dtype(config.dtype, device))
    return estimate_reranking(task, config.join_plan(), prices)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reranked:
    """Scored candidates that are not published yet."""

    config: RerankCandidatesConfig
    storage: Storage
    current: Generation | None
    """The newest one when the job began: a later one of another writer wins."""
    settings: dict[str, Any]
    """The fingerprint, but for the input."""
    joined: Joined
    join_s: float
    plan: Plan
    done: pa.Table
    """OUTPUTS of units that were finished before."""
    made: list[dict[str, Any]]
    """The same of this run's."""
    progress: RerankProgress

    def publish(self, started: float) -> dict[str, Any]:
        """Check that all pairs are there, list the files, write the report; return the summary."""
        outputs = pa.concat_tables([self.done, pa.Table.from_pylist(self.made, schema=OUTPUTS)])
        counts = total_counts(outputs)
        self.config.check_counts(counts, "pairs", rows_in="pairs", rows_out="ranked")
        draft = draft_of_units(
            self.storage,
            self.plan,
            outputs,
            kind="run",
            fingerprint={**self.settings, "input": self.joined.input_id},
            config=asdict(self.config),
            counts=counts,
        )
        published = publish_change(self.storage, draft, self.current)
        tokens = counts["tokens"]
        summary = {
            "generation": published.number,
            **counts,
            "prefix_share": round(counts["tokens_saved"] / tokens, 4) if tokens else None,
            "units_made": len(self.made),
            "units_reused": len(self.done),
            **self.progress.summary(join_s=self.join_s, total_s=time.perf_counter() - started),
        }
        table = PublishedTable(self.storage, published)
        write_report(
            self.storage,
            "reranked",
            summary,
            lambda: {
                **self.progress.details(),
                **reranked_details(table),
                "samples": sample_queries(table, self.joined.units, self.plan.keys, outputs),
            },
        )
        return summary


def scoring_fingerprint(task: RerankTask, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return everything besides the input that changes a reranked run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "template_version": TEMPLATE_VERSION,
        **models[-1],
        "dtype": task.dtype,
        "cascade": {"depth": task.depth, "models": models[:-1]},
        "fusion": task.fusion,
        "fusion_weight": task.fusion_weight if task.fusion == "weighted" else None,
        "top_k": task.top_k,
    }


def _make_units(
    plan: Plan, done: pa.Table, task: RerankTask, pool: PoolPlan, progress: RerankProgress
) -> Iterator[dict[str, Any]]:
    """Make the missing units; yield a row of OUTPUTS for each."""
    stages = Stages(
        read=partial(read_and_tokenize_pairs, task=task),
        actor=RerankActor,
        actor_arguments={"task": task, "num_threads": pool.threads_per_actor},
        write=partial(write_ranked, task=task),
        may_hang=task.needs_models,
    )
    watchers = (progress, UnitMetrics("rerank", len(plan) - len(done)))
    return make_units(plan, done, stages, pool, most_units=_BLOCK_UNITS, watchers=watchers)


def total_counts(outputs: pa.Table) -> dict[str, Any]:
    """Add up the counts of all units."""
    totals: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for text in outputs["counts"]:
        counts = json.loads(text.as_py())
        rejected.update(counts.pop("rejected"))
        dropped.update(counts.pop("dropped"))
        totals.update(counts)
    names = ("queries", "pairs", "ranked", "tokens", "tokens_saved")
    return {
        **{name: totals[name] for name in names},
        "rejected": dict(sorted(rejected.items())),
        "dropped": dict(sorted(dropped.items())),
    }
