"""The synthesis job: a language model writes training pairs for the documents of a corpus.

plan units -> drop those whose file exists -> read documents and draw what is wanted of each -> ask
the model on a pool of actors -> write one file a unit -> check that every document is accounted for
-> publish. Killed anywhere, it goes on where it stopped.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import ray

from qbatch.cli import StrList
from qbatch.corpus.config import CorpusConfig, Format
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError, ConfigError, NoInputError
from qbatch.manifest import fingerprint_id, latest_generation, publish_change
from qbatch.models.hub import resolve_model
from qbatch.models.loading import hash_tokenizer, load_spec, weights_sha256
from qbatch.models.server import ServerConfig
from qbatch.pipelines.cluster import (
    PoolPlan,
    plan_pool,
    ray_session,
)
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.embed import EmbedCorpusConfig, embedding_fingerprint, make_task
from qbatch.pipelines.embed_resume import Plan, draft_of_units
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.metrics import UnitMetrics
from qbatch.pipelines.pair_scoring import as_stored
from qbatch.pipelines.rerank_sources import full_texts
from qbatch.pipelines.sampling import sample_evenly
from qbatch.pipelines.synthesis_units import (
    NUM_CHARACTERS,
    Language,
    LocalModel,
    SynthesisActor,
    SynthesisTask,
    SynthesisUnit,
    embed_personas,
    read_documents,
    write_pairs,
)
from qbatch.pipelines.unit_files import OUTPUTS
from qbatch.pipelines.unit_job import UnitJobConfig
from qbatch.pipelines.unit_stream import Stages, make_units
from qbatch.report.synthesis_progress import SynthesisProgress
from qbatch.report.writing import write_report
from qbatch.schema import SCHEMA_VERSION, ComputeDtype
from qbatch.storage import Storage, probe
from qbatch.training.personas import default_personas
from qbatch.training.synthesis import (
    TEMPLATE_VERSION,
    TaskKind,
    Wish,
    configuration_prompt,
    sample_configuration,
    text_prompt,
)

log = logging.getLogger(__name__)

_SAMPLE_UNITS = 8

_BLOCK_UNITS = 1
"""Units of a Ray block: a model takes long over each."""

_MAX_PERSONAS = 200_000
"""Every actor holds them and their vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesizePairsConfig(UnitJobConfig):
    """Let a language model write training pairs for the documents of a corpus."""

    input: str
    """Corpus: directory, object, glob, or hf://datasets/ORG/NAME."""
    output: str
    """Directory of the pairs table."""
    model: str
    """Language model: directory or hub id; with --endpoint, what the server calls it."""
    endpoint: str | None = None
    """OpenAI-compatible server that answers, such as http://host:8000/v1; the key, if it needs one,
    is in the environment as QBATCH_API_KEY. None runs the model in the actors."""
    revision: str | None = None
    """Commit of a hub id."""
    task: TaskKind = "retrieval"
    """Kind of pair: a query for the document; its translation; the same in other words; its
    topic."""
    response: Literal["json", "plain"] = "json"
    """json: the model chooses who asks and what, and answers in strict JSON. plain: for small
    models, which can do neither; who and what are drawn by chance, the answer is the bare text."""
    languages: StrList = ()
    """NAME:WEIGHT or NAME:WEIGHT:QUOTA (most pairs) of the languages to write in, such as
    English:3,German:1:5000; empty is the language of each passage."""
    personas: str | None = None
    """Who may ask: text lines, or rows with a column persona; None is a neutral list of twenty."""
    persona_model: str | None = None
    """Embedder that finds the five people closest to a passage; None draws five by chance."""
    pairs_per_document: int = 1
    """Pairs asked for."""
    fraction: float = 1.0
    """Share of the documents that get pairs, drawn by --seed."""
    instruction: str | None = None
    """Task sentence written to the pairs; None is that of the kind (none for retrieval)."""
    max_chars: int = 6000
    """Characters of a passage that the model sees."""
    max_attempts: int = 3
    """Answers asked for at each stage before a document is rejected."""
    max_answer_tokens: int = 256
    """Longest answer; translations of long passages need more."""
    temperature: float = 0.7
    """Of sampling; 0 is the likeliest answer, and then every attempt gets the same."""
    top_p: float = 0.9
    """Of sampling: the likeliest tokens that together have this chance."""
    seed: int = 0
    """Of everything that is drawn."""
    concurrency: int = 32
    """Requests on their way to the server at a time, from each actor."""
    timeout_s: float = 120.0
    """For one answer of the server."""
    max_retries: int = 8
    """How often a request is sent again after 429, 5xx, time-outs and broken connections."""
    format: Format = "auto"
    """How to read the corpus; auto goes by names."""
    id_column: str = "doc_id"
    """Column of the document's id."""
    text_column: str = "text"
    """Column of its text."""
    title_column: str | None = None
    """Column of a title that goes before the text; None for none."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype; auto is bfloat16 where the processor has it, else float32."""
    token_budget: int | None = None
    """Tokens of prompts and answers in one batch; None suits the device."""
    max_actors: int | None = None
    """Largest pool; None is what the cluster has GPUs or processors for, and 1 with a server."""
    max_bad_fraction: float = 0.2
    """Share of documents without a usable answer above which nothing is published."""
    unit_bytes: int = 2**18
    """Aimed size of a unit of work in bytes of input: a model takes long over little text."""
    stall_timeout_s: float = 3600.0
    """Seconds without a finished unit after which the job ends with code 6."""
    dry_run: bool = False
    """Print the plan and an example of the prompts; ask nothing."""

    def __post_init__(self) -> None:
        UnitJobConfig.__post_init__(self)
        for name in ("pairs_per_document", "max_chars", "max_attempts", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("fraction", "top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give above 0, at most 1")
        for name in ("temperature", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        parse_languages(self.languages)
        if self.task == "bitext" and not self.languages:
            raise ConfigError("--task=bitext without --languages; name one to translate into")
        self.server()

    def server(self) -> ServerConfig | None:
        """Return the server, None for a model in the actors."""
        if self.endpoint is None:
            return None
        return ServerConfig(
            endpoint=self.endpoint,
            model=self.model,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
        )

    def corpus(self) -> CorpusConfig:
        """Return how documents are read."""
        return resolve_config(
            CorpusConfig(
                input=self.input,
                format=self.format,
                id_column=self.id_column,
                text_column=self.text_column,
                title_column=self.title_column,
                unit_bytes=self.unit_bytes,
            )
        )

    def make_task(self, pool: PoolPlan | None) -> SynthesisTask:
        """Return what every process needs to know; without a pool nothing is to be computed."""
        persona_embedder = None
        if self.persona_model is not None and pool is not None:
            persona_embedder = _persona_task(self, pool)
        dtype: ComputeDtype = "float32"
        if self.endpoint is None and pool is not None:
            dtype = compute_dtype(self.dtype, pool.gpus_per_actor)
        return SynthesisTask(
            corpus=self.corpus(),
            output=self.output,
            kind=self.task,
            plain=self.response == "plain",
            languages=parse_languages(self.languages),
            pairs_per_document=self.pairs_per_document,
            fraction=self.fraction,
            max_chars=self.max_chars,
            max_attempts=self.max_attempts,
            max_answer_tokens=self.max_answer_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            instruction=self.instruction,
            seed=self.seed,
            engine=self.server()
            or LocalModel(
                model=self.model,
                revision=self.revision,
                dtype=dtype,
                token_budget=self.token_budget,
            ),
            persona_embedder=persona_embedder,
        )


def _persona_task(config: SynthesizePairsConfig, pool: PoolPlan) -> EmbedTask:
    model = str(config.persona_model)
    spec = load_spec(resolve_model(model, None))
    embed = EmbedCorpusConfig(input=config.input, output=config.output, model=model)
    return make_task(embed, spec, compute_dtype("auto", pool.gpus_per_actor))


def parse_languages(items: Sequence[str]) -> tuple[Language, ...]:
    """Read ``NAME:WEIGHT`` and ``NAME:WEIGHT:QUOTA``; nothing is the language of each passage.

    Raises:
        ConfigError: An item is neither.
    """
    found = []
    for item in items:
        name, *numbers = item.split(":")
        try:
            weight, quota = float(numbers[0]), [int(number) for number in numbers[1:]]
        except (ValueError, IndexError):
            weight, quota = -1.0, []
        if not name or weight <= 0 or len(numbers) > 2 or any(q < 1 for q in quota):
            raise ConfigError(
                f"--languages holds {item!r}; give NAME:WEIGHT or NAME:WEIGHT:QUOTA, such as "
                "German:1:5000, with a weight above 0 and a quota from 1 on"
            )
        found.append(Language(name=name, weight=weight, quota=quota[0] if quota else None))
    return tuple(found) or (Language(name="", weight=1.0),)


def synthesize_pairs(config: SynthesizePairsConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    personas = read_personas(config.personas)
    if config.dry_run:
        return _estimate(config, personas)
    storage = Storage(config.output, single_writer=config.single_writer)
    probe(storage)
    current = latest_generation(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s):
        pool = _pool(config)
        task = config.make_task(pool)
        settings = synthesis_fingerprint(task, personas)
        task = replace(task, fingerprint=fingerprint_id(settings))
        plan = Plan(synthesis_units(task), task.fingerprint)
        done = finished_units(storage, plan.keys, current)
        log.info("%d units planned, %d of them finished already", len(plan), len(done))
        progress = SynthesisProgress(len(plan) - len(done))
        made = list(_make_units(plan, done, task, pool, (personas, progress)))
    outputs = pa.concat_tables([done, pa.Table.from_pylist(made, schema=OUTPUTS)])
    counts = total_counts(outputs)
    config.check_counts(counts, "documents")
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
        "units_made": len(made),
        "units_reused": len(done),
        **progress.summary(total_s=time.perf_counter() - started),
    }
    write_report(storage, "pairs", summary)
    return summary


def read_personas(uri: str | None) -> list[str]:
    """Return the people who may ask.

    Raises:
        ConfigError: There are too many to be held.
        BadInputError: There are none.
        NoInputError: Nothing of a known format lies there.
    """
    if uri is None:
        return default_personas()
    config = CorpusConfig(
        input=uri,
        format="text-lines" if uri.endswith(".txt") else "auto",
        text_column="persona",
    )
    units = plan_units(config)
    found = [
        text.strip()
        for unit in units
        for text in read_unit(unit, config).documents["text"].to_pylist()
    ]
    if not found:
        raise BadInputError(
            f"no people in --personas={uri}; give a .txt with one a line, or rows with a column "
            "persona"
        )
    if len(found) > _MAX_PERSONAS:
        raise ConfigError(
            f"--personas={uri} has {len(found):,} people, {_MAX_PERSONAS:,} can be held; give a "
            "sample of them"
        )
    return found


def synthesis_fingerprint(task: SynthesisTask, personas: Sequence[str]) -> dict[str, Any]:
    """Return everything besides the documents that changes what is asked, and of whom."""
    names = (
        *("kind", "plain", "pairs_per_document", "fraction", "max_chars", "max_attempts"),
        *("max_answer_tokens", "temperature", "top_p", "instruction", "seed"),
    )
    embedder = None
    if task.persona_embedder is not None:
        spec = load_spec(resolve_model(task.persona_embedder.model, None))
        embedder = embedding_fingerprint(task.persona_embedder, spec)
    return {
        "schema_version": SCHEMA_VERSION,
        "template_version": TEMPLATE_VERSION,
        **{name: getattr(task, name) for name in names},
        "languages": [asdict(language) for language in task.languages],
        "personas": hashlib.sha256("\n".join(personas).encode()).hexdigest(),
        "persona_embedder": embedder,
        "engine": _engine_fingerprint(task.engine),
        "corpus": as_stored(task.corpus.fingerprint()),
    }


def _engine_fingerprint(engine: ServerConfig | LocalModel) -> dict[str, Any]:
    if isinstance(engine, ServerConfig):
        return {"served": engine.model}
    path = resolve_model(engine.model, engine.revision)
    return {
        "weights_sha256": weights_sha256(path),
        "tokenizer_sha256": hash_tokenizer(path),
        "dtype": engine.dtype,
    }


def synthesis_units(task: SynthesisTask) -> Iterator[SynthesisUnit]:
    """Yield the units of the corpus, quotas shared out among them as evenly as whole pairs go."""
    units = plan_units(task.corpus)
    quotas = [language.quota for language in task.languages]
    if all(quota is None for quota in quotas):
        yield from (SynthesisUnit(unit=unit, quotas=tuple(quotas)) for unit in units)
        return
    held = list(units)
    for i, unit in enumerate(held):
        shares = (
            None if quota is None else quota * (i + 1) // len(held) - quota * i // len(held)
            for quota in quotas
        )
        yield SynthesisUnit(unit=unit, quotas=tuple(shares))


def _pool(config: SynthesizePairsConfig) -> PoolPlan:
    if config.endpoint is None:
        return config.pool()
    most = config.max_actors or config.min_actors or 1
    return plan_pool(config.min_actors, most, config.gpus_per_actor or 0.0)


def _make_units(
    plan: Plan,
    done: pa.Table,
    task: SynthesisTask,
    pool: PoolPlan,
    shared: tuple[Sequence[str], SynthesisProgress],
) -> Iterator[dict[str, Any]]:
    """Run the missing units through the pipeline; yield a row of OUTPUTS for each."""
    if len(done) == len(plan):
        return
    personas, progress = shared
    vectors = None
    if task.persona_embedder is not None and len(personas) > NUM_CHARACTERS:
        embed = ray.remote(num_cpus=pool.cpus_per_actor, num_gpus=pool.gpus_per_actor)(
            embed_personas
        )
        vectors = ray.get(embed.remote(task.persona_embedder, list(personas)))
    stages = Stages(
        read=partial(read_documents, task=task),
        actor=SynthesisActor,
        actor_arguments={
            "task": task,
            "personas": list(personas),
            "persona_vectors": vectors,
            "num_threads": pool.threads_per_actor,
        },
        write=partial(write_pairs, task=task),
    )
    watchers = (progress, UnitMetrics("synthesize", len(plan) - len(done)))
    yield from make_units(plan, done, stages, pool, most_units=_BLOCK_UNITS, watchers=watchers)


def total_counts(outputs: pa.Table) -> dict[str, Any]:
    """Add up the counts of all units."""
    totals: Counter[str] = Counter()
    nested: dict[str, Counter[str]] = {"rejected": Counter(), "dropped": Counter()}
    for text in outputs["counts"]:
        counts = json.loads(text.as_py())
        for name, total in nested.items():
            total.update(counts.pop(name))
        totals.update(counts)
    names = ("rows_in", "rows_out", "pairs", "requests", "retries")
    sums = {name: totals[name] for name in names}
    return {**sums, **{name: dict(sorted(total.items())) for name, total in nested.items()}}


def _estimate(config: SynthesizePairsConfig, personas: Sequence[str]) -> dict[str, Any]:
    """Return what a job would do, from a plan and a small sample, and an example of the prompts."""
    task = config.make_task(None)
    units = list(synthesis_units(task))
    sample = sample_evenly(units, _SAMPLE_UNITS)
    tables = [read_unit(one.unit, task.corpus).documents for one in sample]
    documents = sum(map(len, tables))
    example = next((table for table in tables if len(table)), None)
    if example is None:
        raise NoInputError(f"no usable text in a sample of {len(sample)} units of {config.input}")
    passage = full_texts(example)[0].as_py()[: task.max_chars]
    wish = Wish(language=task.languages[0].name, characters=list(personas)[:NUM_CHARACTERS], seed=0)
    chosen = sample_configuration(wish)
    prompts = [text_prompt(task.kind, passage, wish, chosen, plain=task.plain)]
    if task.kind == "retrieval" and not task.plain:
        prompts.insert(0, configuration_prompt(passage, wish))
    expected = documents * len(units) / len(sample) * task.fraction * task.pairs_per_document
    return {
        "dry_run": True,
        "units": len(units),
        "documents_estimated": round(documents * len(units) / len(sample)),
        "requests_estimated": round(expected * len(prompts)),
        "prompts": ["\n\n".join(prompt) for prompt in prompts],
    }
