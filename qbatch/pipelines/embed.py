"""The embed job: a corpus becomes a published vectors table.

plan units -> drop those whose file exists -> read, embed and write the rest -> check that every row
is accounted for -> publish. Killed anywhere, it goes on where it stopped.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from qbatch.cli import IntList, StrList
from qbatch.corpus.config import CorpusConfig, Format
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.units import plan_units
from qbatch.errors import ConfigError
from qbatch.manifest import Generation, fingerprint_id, latest_generation, publish_change
from qbatch.models.devices import check_quantizable, resolve_device, resolve_dtype
from qbatch.models.hub import resolve_model
from qbatch.models.loading import ModelSpec, load_spec, read_config, weights_sha256
from qbatch.models.prompts import document_prompt, query_prompt
from qbatch.models.roofline import flops_per_token
from qbatch.pipelines.cluster import PoolPlan, ray_session
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.embed_calibration import with_calibration
from qbatch.pipelines.embed_estimate import Prices, estimate
from qbatch.pipelines.embed_forward import EmbedActor
from qbatch.pipelines.embed_known import VanishedFiles
from qbatch.pipelines.embed_read import read_and_tokenize, read_carefully
from qbatch.pipelines.embed_resume import Plan, draft_of_units
from qbatch.pipelines.embed_reuse import Reuse, vanished_files
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.pipelines.embed_write import write_unit
from qbatch.pipelines.engine import EngineConfig
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.metrics import UnitMetrics
from qbatch.pipelines.unit_files import OUTPUTS
from qbatch.pipelines.unit_stream import Stages, make_units
from qbatch.report.embedding import vectors_details
from qbatch.report.progress import EmbedProgress
from qbatch.report.writing import write_report
from qbatch.schema import SCHEMA_VERSION, ComputeDtype, VectorDtype, Weights
from qbatch.storage import Storage, probe
from qbatch.tables import PublishedTable

log = logging.getLogger(__name__)

_BLOCK_UNITS = 100
"""Most units of a Ray block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedCorpusConfig(EngineConfig):
    """Embed a corpus into a published vectors table."""

    input: str
    """Directory, object, glob, or hf://datasets/ORG/NAME to read."""
    output: str
    """Directory of the vectors table."""
    model: str
    """Model directory or hub id, such as Qwen/Qwen3-Embedding-0.6B."""
    revision: str | None = None
    """Commit of a hub id; None is the pinned one of a known model."""
    format: Format = "auto"
    """How to read the input; auto goes by names."""
    id_column: str = "doc_id"
    """Column of the user's document id."""
    text_column: str = "text"
    """Column of the text."""
    title_column: str | None = None
    """Column of a title that goes before every passage; None for none."""
    keep_columns: StrList = ()
    """Columns copied to the output."""
    hf_split: str = "train"
    """Split of a Hugging Face dataset."""
    instruction: str | None = None
    """Embed the texts as queries for this task."""
    queries: bool = False
    """Embed the texts as queries with the model's own prompt; --instruction does so by itself."""
    max_tokens: int | None = None
    """Longest passage, special tokens and prompt included; None is the model's own limit."""
    overlap_tokens: int = 0
    """Tokens repeated between neighbouring passages of a long document."""
    token_budget: int | None = None
    """Tokens in one forward pass; None suits the device."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype; auto is bfloat16 where the processor has it, else float32."""
    weights: Weights = "float"
    """int8 rounds the weights of linear layers: faster on a CPU, for some quality; float32 only."""
    dims: IntList = ()
    """Widths to write (Matryoshka), the first as "vector"; empty is the model's own width."""
    vector_dtype: VectorDtype = "float32"
    """Stored dtype; int8 is calibrated once on a sample."""
    on_bad_row: Literal["quarantine", "fail", "skip"] = "quarantine"
    """Write bad rows to the rejects table, stop at the first, or only count them."""
    reuse: Reuse = "by-hash"
    """Where a changed object's known documents get their vectors from: by-hash from any changed or
    deleted object of the last generation, by-object from the same one, off embeds them again."""
    unit_bytes: int = 16 * 2**20
    """Aimed size of a unit of work in bytes of input."""
    gpu_hourly_price: float | None = None
    """Price of one GPU, or of one CPU machine without GPUs, for an hour."""
    tokens_per_s: float | None = None
    """Speed of one actor for --dry-run; None measures it on this machine."""
    dry_run: bool = False
    """Print plan, token histogram, time and cost; start nothing."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if any(dim < 1 for dim in self.dims) or len(set(self.dims)) < len(self.dims):
            raise ConfigError(f"dims are {self.dims}; give different positive widths")
        self.corpus()
        self.server_of(self.model, self.dtype)
        if self.weights == "int8":
            self._check_int8()

    def _check_int8(self) -> None:
        check_quantizable(self.dtype, None)
        if self.engine == "http":
            raise ConfigError(
                "--weights=int8 with --engine=http; allowed is --engine=local, since a server "
                "rounds its own weights. Leave out one of them"
            )
        if self.gpus_per_actor:
            raise ConfigError(
                f"--gpus-per-actor={self.gpus_per_actor:g} with --weights=int8; allowed is 0, int8 "
                "weights compute on CPUs. Give --gpus-per-actor=0, or leave out --weights"
            )

    @property
    def wanted_dtype(self) -> Literal["auto"] | ComputeDtype:
        """The compute dtype asked for: int8 weights leave float32 only."""
        return "float32" if self.weights == "int8" else self.dtype

    def corpus(self) -> CorpusConfig:
        """Return the part of the settings that says what to read and how."""
        return CorpusConfig(
            input=self.input,
            format=self.format,
            id_column=self.id_column,
            text_column=self.text_column,
            title_column=self.title_column,
            keep_columns=self.keep_columns,
            unit_bytes=self.unit_bytes,
            on_bad_row=self.on_bad_row,
            hf_split=self.hf_split,
        )


def embed_corpus(config: EmbedCorpusConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    model = resolve_model(config.model, config.revision)
    if config.dry_run:
        return _estimate(config, load_spec(model))
    storage = Storage(config.output, single_writer=config.single_writer)
    probe(storage)
    current = latest_generation(storage)
    # Ray takes seconds to start, and so does reading a model's description. Nothing may run beside
    # its stop: freeing one of its objects then, in any thread, ends the process.
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(load_spec, model)
        with ray_session(stall_timeout_s=config.stall_timeout_s):
            spec = loading.result()
            pool = plan_embed_pool(config)
            task, fingerprint = _resolve(config, spec, storage, pool)
            plan = Plan(plan_units(task.corpus), task.unit_fingerprint)
            done = finished_units(storage, plan.keys, current)
            log.info("%d units planned, %d of them finished already", len(plan), len(done))
            progress = EmbedProgress(len(plan) - len(done))
            find_vanished = partial(
                vanished_files,
                storage,
                current,
                plan.keys,
                fingerprint=fingerprint,
                reuse=config.reuse,
                stall_timeout_s=config.stall_timeout_s,
            )
            made = list(_make_units(plan, done, task, pool, progress, find_vanished))
            embedded = _Embedded(
                config=config,
                spec=spec,
                storage=storage,
                current=current,
                fingerprint=fingerprint,
                plan=plan,
                done=done,
                made=made,
                progress=progress,
            )
    return embedded.publish(started)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Embedded:
    """A finished corpus that is not published yet."""

    config: EmbedCorpusConfig
    spec: ModelSpec
    storage: Storage
    current: Generation | None
    """The newest one when the job began: a later one of another writer wins."""
    fingerprint: dict[str, Any]
    plan: Plan
    done: pa.Table
    """OUTPUTS of units that were finished before."""
    made: list[dict[str, Any]]
    """The same of this run's."""
    progress: EmbedProgress

    def publish(self, started: float) -> dict[str, Any]:
        """Check that all rows are there, list the files, write the report; return the summary."""
        outputs = pa.concat_tables([self.done, pa.Table.from_pylist(self.made, schema=OUTPUTS)])
        counts = total_counts(outputs)
        self.config.check_counts(counts, "rows", rows_out="rows_embedded")
        draft = draft_of_units(
            self.storage,
            self.plan,
            outputs,
            kind="vectors",
            fingerprint=self.fingerprint,
            config=asdict(self.config),
            counts=counts,
        )
        published = publish_change(self.storage, draft, self.current)
        summary = {
            "generation": published.number,
            "rows_in": counts["rows_in"],
            "passages": counts["passages"],
            "rejected": counts["rejected"],
            "units_made": len(self.made),
            "units_reused": len(self.done),
            "passages_embedded": self.progress.num_embedded,
            "tokens": counts["tokens"],
            **self.progress.summary(total_s=time.perf_counter() - started),
        }
        table = PublishedTable(self.storage, published)
        write_report(self.storage, "vectors", summary, partial(self._details, table))
        return summary

    def _details(self, table: PublishedTable) -> dict[str, Any]:
        counts = table.generation.counts
        mean_tokens = counts["tokens"] // max(1, counts["passages"])
        flops = flops_per_token(read_config(self.spec.path), mean_tokens)
        compute = self.progress.compute(flops, self.config.gpu_hourly_price)
        return {**self.progress.details(), "compute": compute, **vectors_details(table)}


def plan_embed_pool(config: EmbedCorpusConfig) -> PoolPlan:
    """Return the pool that embeds; a server, and int8 weights, need no GPUs."""
    return config.pool(needs_gpus=config.engine == "local" and config.weights == "float")


def _resolve(
    config: EmbedCorpusConfig, spec: ModelSpec, storage: Storage, pool: PoolPlan
) -> tuple[EmbedTask, dict[str, Any]]:
    """Return what all processes need to know, with nothing left open, and the fingerprint."""
    task = make_task(config, spec, compute_dtype(config.wanted_dtype, pool.gpus_per_actor))
    task = replace(task, corpus=resolve_config(task.corpus))
    fingerprint = embedding_fingerprint(task, spec)
    if config.vector_dtype == "int8":
        task = with_calibration(task, storage, fingerprint, pool)
        fingerprint["scales"] = list(task.scales)
    return replace(task, fingerprint=fingerprint_id(fingerprint)), fingerprint


def _estimate(config: EmbedCorpusConfig, spec: ModelSpec) -> dict[str, Any]:
    config.check_foretold(config.tokens_per_s)
    device = resolve_device()
    gpus = config.gpus_per_actor
    prices = Prices(
        tokens_per_s=config.tokens_per_s,
        num_actors=config.max_actors or config.min_actors or 1,
        gpus_per_actor=float(device.type == "cuda") if gpus is None else gpus,
        gpu_hourly_price=config.gpu_hourly_price,
    )
    return estimate(make_task(config, spec, resolve_dtype(config.wanted_dtype, device)), prices)


def make_task(config: EmbedCorpusConfig, spec: ModelSpec, dtype: ComputeDtype) -> EmbedTask:
    """Resolve the settings against the model; what is left open here is filled in by the caller.

    Raises:
        ConfigError: The model cannot do what was asked.
    """
    max_tokens = config.max_tokens or spec.max_tokens
    if max_tokens > spec.max_tokens:
        raise ConfigError(
            f"--max-tokens={max_tokens} is more than the {spec.max_tokens} tokens that "
            f"{config.model} takes; lower it: longer documents are split, not lost"
        )
    dims = config.dims or (spec.hidden_dim,)
    if max(dims) > spec.hidden_dim:
        raise ConfigError(
            f"--dims={','.join(map(str, dims))} asks for more than the {spec.hidden_dim} "
            f"components of {config.model}; ask for at most {spec.hidden_dim}"
        )
    return EmbedTask(
        corpus=config.corpus(),
        output=config.output,
        model=config.model,
        revision=config.revision,
        tokenizer=spec.tokenizer,
        prompt=_prompt(config, spec),
        max_tokens=max_tokens,
        overlap_tokens=config.overlap_tokens,
        dims=dims,
        normalize=spec.normalize,
        dtype=dtype,
        weights=config.weights,
        token_budget=config.token_budget,
        vector_dtype=config.vector_dtype,
        server=config.server_of(config.model, config.dtype),
    )


def _prompt(config: EmbedCorpusConfig, spec: ModelSpec) -> str:
    if config.instruction is None and not config.queries:
        return document_prompt(spec.prompts)
    return query_prompt(
        spec.prompts, architecture=spec.architecture, instruction=config.instruction
    )


def embedding_fingerprint(task: EmbedTask, spec: ModelSpec) -> dict[str, Any]:
    """Return everything that changes a vector, and nothing that only changes how fast it comes."""
    # Named only where it is int8: tables made before there was a choice keep their fingerprint.
    weights = {} if task.weights == "float" else {"weights": task.weights}
    return {
        "schema_version": SCHEMA_VERSION,
        "weights_sha256": weights_sha256(spec.path),
        "tokenizer_sha256": spec.tokenizer_sha256,
        "architecture": spec.architecture,
        "pooling": spec.pooling,
        "normalize": spec.normalize,
        "prompt": task.prompt,
        "max_tokens": task.max_tokens,
        "overlap_tokens": task.overlap_tokens,
        "dims": list(task.dims),
        "dtype": task.dtype,
        "vector_dtype": task.vector_dtype,
        "scales": list(task.scales),
        **weights,
    }


def planned_fingerprint(config: EmbedCorpusConfig) -> dict[str, Any]:
    """Return the fingerprint a job will have, without running it; the dtype must be named."""
    dtype = config.wanted_dtype
    if dtype == "auto":
        raise ValueError("the dtype is decided on the hardware that computes; name one")
    spec = load_spec(resolve_model(config.model, config.revision))
    return embedding_fingerprint(make_task(config, spec, dtype), spec)


def _make_units(
    plan: Plan,
    done: pa.Table,
    task: EmbedTask,
    pool: PoolPlan,
    progress: EmbedProgress,
    find_vanished: Callable[[], VanishedFiles | None],
) -> Iterator[dict[str, Any]]:
    """Make the missing units; yield a row of OUTPUTS for each."""
    if len(done) == len(plan):
        return
    vanished = find_vanished()
    stages = Stages(
        read=partial(read_and_tokenize, task=task, vanished=vanished),
        read_carefully=partial(read_carefully, task=task, vanished=vanished),
        actor=EmbedActor,
        actor_arguments={"task": task, "num_threads": pool.threads_per_actor},
        write=partial(write_unit, task=task),
        may_hang=task.server is None,
    )
    watchers = (progress, UnitMetrics("embed", len(plan) - len(done)))
    yield from make_units(plan, done, stages, pool, most_units=_BLOCK_UNITS, watchers=watchers)


def total_counts(outputs: pa.Table) -> dict[str, Any]:
    """Add up the counts of all units."""
    totals: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for text in outputs["counts"]:
        counts = json.loads(text.as_py())
        rejected.update(counts.pop("rejected"))
        notes.update(counts.pop("notes"))
        totals.update(counts)
    names = ("rows_in", "rows_embedded", "passages", "tokens")
    return {
        **{name: totals[name] for name in names},
        "rejected": dict(sorted(rejected.items())),
        "notes": dict(sorted(notes.items())),
    }
