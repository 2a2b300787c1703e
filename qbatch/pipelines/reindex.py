"""The night: embed what changed, refresh the index, answer again, check all of it, release it.

Each step is a job of its own that makes what is missing and publishes its table; the next step is
pinned to that very generation. The release, written last, names the generations that belong
together, so that a night that dies or fails a gate leaves readers where they were.
"""

import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from qbatch.cli import Derived
from qbatch.corpus.config import Format
from qbatch.errors import CommitRaceLostError, ConfigError, QbatchError, QualityGateError
from qbatch.lease import hold_lease
from qbatch.manifest import fingerprint_id
from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.cluster import ray_session
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.embed import (
    EmbedCorpusConfig,
    embed_corpus,
    plan_embed_pool,
    planned_fingerprint,
)
from qbatch.pipelines.precompute import Mode, PrecomputeConfig, precompute
from qbatch.pipelines.release_gates import GatesConfig, check_gates, format_gates
from qbatch.release import Release, TableRef, latest_release, open_release, publish_release
from qbatch.report.night import release_trend
from qbatch.report.writing import write_report
from qbatch.storage import Storage, probe

log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", EmbedCorpusConfig, BuildIndexConfig, PrecomputeConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedStep(EmbedCorpusConfig):
    """The corpus and its model: embed_corpus.py, with the table below the night's --output."""

    output: Derived[str] = ""
    single_writer: Derived[bool] = False
    dry_run: Derived[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexStep(BuildIndexConfig):
    """The index: build_index.py of these vectors; small changes go to delta shards."""

    max_delta_share: float = 0.1
    vectors: Derived[str] = ""
    vectors_generation: Derived[int | None] = None
    output: Derived[str] = ""
    single_writer: Derived[bool] = False
    dry_run: Derived[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _PrecomputeStep(PrecomputeConfig):
    """What both kinds of precomputing leave to the night."""

    index: Derived[str] = ""
    index_generation: Derived[int | None] = None
    output: Derived[str] = ""
    corpus: Derived[str | None] = None
    corpus_format: Derived[Format] = "auto"
    corpus_id_column: Derived[str] = "doc_id"
    corpus_text_column: Derived[str] = "text"
    corpus_title_column: Derived[str | None] = None
    single_writer: Derived[bool] = False
    dry_run: Derived[bool] = False

    def __post_init__(self) -> None:
        if self.index:  # the night has filled in what these checks look at
            PrecomputeConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswersStep(_PrecomputeStep):
    """Answers to a log of queries: precompute.py; made when queries are named."""

    mode: Derived[Mode] = "queries"


@dataclass(frozen=True, kw_only=True, slots=True)
class RelatedStep(_PrecomputeStep):
    """Related documents of every document: precompute.py; made when enabled."""

    mode: Derived[Mode] = "items"
    queries: Derived[str | None] = None
    enabled: bool = False
    """Make this table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishStep:
    """How the night ends, and how it keeps out of another's way."""

    release: bool = True
    """Release what passes the gates; without it tables are made and gates reported, as for trying
    a new model beside the one that serves."""
    wait_s: float = 0.0
    """Seconds to wait for a night that works here already, before ending with code 5."""
    lease_s: float = 120.0
    """Seconds without a sign of life after which another night is taken for dead; 0 asks nobody."""

    def __post_init__(self) -> None:
        if self.wait_s < 0 or self.lease_s < 0:
            raise ConfigError(f"wait_s={self.wait_s}, lease_s={self.lease_s}; give 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReindexConfig:
    """Bring vectors, index and precomputed tables up to date and release them together."""

    output: str
    """Directory of the releases and, below it, of all tables."""
    embed: EmbedStep
    index: IndexStep = field(default_factory=IndexStep)
    answers: AnswersStep = field(default_factory=AnswersStep)
    related: RelatedStep = field(default_factory=RelatedStep)
    gates: GatesConfig = field(default_factory=GatesConfig)
    publish: PublishStep = field(default_factory=PublishStep)
    compare_to: int | None = None
    """Release that the gates compare with; None is the newest."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""
    dry_run: bool = False
    """Print the plan; start nothing."""

    def __post_init__(self) -> None:
        if self.gates.qrels is not None and self.answers.queries is None:
            raise ConfigError(
                f"gates.qrels is {self.gates.qrels!r} without answers.queries, whose answers it "
                "judges; give both or neither"
            )
        for name in self.precomputed:
            self.precompute_step(name, "model", TableRef(path="index", generation=1))

    @property
    def precomputed(self) -> list[str]:
        """Which of the tables answers and related are made."""
        made = {"answers": self.answers.queries is not None, "related": self.related.enabled}
        return [name for name, is_made in made.items() if is_made]

    def embed_step(self, directory: str) -> EmbedCorpusConfig:
        """Return the settings of the first step, below a directory of ``output``."""
        return self._filled(self.embed, f"{directory}/vectors")

    def index_step(self, directory: str, vectors: TableRef) -> BuildIndexConfig:
        """Return the settings of the second step, pinned to what the first one published."""
        return replace(
            self._filled(self.index, f"{directory}/index"),
            vectors=self._uri(vectors.path),
            vectors_generation=vectors.generation,
        )

    def precompute_step(self, name: str, directory: str, index: TableRef) -> PrecomputeConfig:
        """Return the settings of answers or related, pinned to what the second step published."""
        step: PrecomputeConfig = self.answers if name == "answers" else self.related
        embed = self.embed
        filled = replace(
            step,
            index=self._uri(index.path),
            index_generation=index.generation,
            corpus=embed.input if step.reranker is not None else None,
            corpus_format=embed.format,
            corpus_id_column=embed.id_column,
            corpus_text_column=embed.text_column,
            corpus_title_column=embed.title_column,
        )
        return self._filled(filled, f"{directory}/{name}")

    def _filled(self, step: ConfigT, path: str) -> ConfigT:
        return replace(
            step, output=self._uri(path), single_writer=self.single_writer, dry_run=self.dry_run
        )

    def _uri(self, path: str) -> str:
        return f"{self.output.rstrip('/')}/{path}"


def reindex(config: ReindexConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    storage = Storage(config.output, single_writer=config.single_writer)
    if config.dry_run:
        return _estimate(config, storage)
    probe(storage)
    with hold_lease(
        storage,
        holder=f"{socket.gethostname()}, process {os.getpid()}",
        lease_s=config.publish.lease_s,
        wait_s=config.publish.wait_s,
    ):
        night = _Night.begin(config, storage)
        try:
            with ray_session(stall_timeout_s=config.embed.stall_timeout_s):
                summary = night.run()
        except CommitRaceLostError:
            raise  # the report is the winner's
        except QbatchError as error:
            night.write_report({"released": False, "error": str(error), **night.summary()})
            raise
        night.write_report(summary)
    return summary


def _estimate(config: ReindexConfig, storage: Storage) -> dict[str, Any]:
    """Return what a night would do, for ``--dry-run``."""
    dtype = resolve_dtype(config.embed.wanted_dtype, resolve_device())
    directory = model_directory(replace(config.embed, dtype=dtype))
    current = latest_release(storage)
    return {
        "release": current.number if current else None,
        "directory": directory,
        "is_new_model": current is None or current.tables["vectors"].path != f"{directory}/vectors",
        "steps": ["embed", "index", *config.precomputed, "gates"],
        "embed": embed_corpus(config.embed_step(directory)),
    }


def model_directory(embed: EmbedCorpusConfig) -> str:
    """Return where the tables of a model lie: a new one gets its own, beside those that serve.

    Args:
        embed: The dtype must be named, since it changes vectors.
    """
    return f"model-{fingerprint_id(planned_fingerprint(embed))[:8]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Night:
    """What the steps of one night share, and what they have done so far."""

    config: ReindexConfig
    storage: Storage
    started: float
    current: Release | None
    """The newest when the night began: a later one of another writer wins."""
    last: Release | None
    """The one to compare with."""
    steps: dict[str, Any] = field(default_factory=dict)
    """Summaries of the jobs, as they end."""
    tables: dict[str, TableRef] = field(default_factory=dict)

    @classmethod
    def begin(cls, config: ReindexConfig, storage: Storage) -> "_Night":
        """Look at what serves.

        Raises:
            NoInputError: The release to compare with does not exist.
        """
        current = latest_release(storage)
        number = config.compare_to
        last = current if number is None else open_release(config.output, number)
        return cls(
            config=config, storage=storage, started=time.perf_counter(), current=current, last=last
        )

    def run(self) -> dict[str, Any]:
        """Make all tables, check them, release them; return the summary."""
        self.make_tables()
        if self.current is not None and self._are_known(self.current):
            return self._unreleased()
        gates, evaluation = check_gates(
            {name: ref.open(self.storage) for name, ref in self.tables.items()},
            {name: self.last.open(name) for name in self.last.tables} if self.last else None,
            self.config.gates,
        )
        self.steps["gates"] = [gate.as_dict() for gate in gates]
        self.steps["evaluation"] = evaluation
        table = format_gates(self.steps["gates"])
        log.info("gates, compared with release %s\n%s", self.last and self.last.number, table)
        if failed := [gate.name for gate in gates if not gate.passed]:
            raise QualityGateError(
                f"{len(failed)} of {len(gates)} gates failed ({', '.join(failed)}); nothing was "
                f"released, {self._serving} stays. Look at the tables, or change a threshold "
                f"under [gates] knowingly, and run again: all work is kept\n{table}"
            )
        if not self.config.publish.release:
            log.info("gates passed; nothing is released, as --publish.no-release asks")
            return self._unreleased()
        return self._release()

    def _are_known(self, current: Release) -> bool:
        """Tell whether these very tables serve, or were taken back."""
        if self.tables == current.tables:
            log.info("nothing changed: %s stays", self._serving)
            return True
        if self.tables in current.withdrawn:
            log.warning(
                "these tables were rolled back and are not released again: %s stays until the "
                "corpus or the settings change", self._serving,
            )  # fmt: skip
            return True
        return False

    @property
    def _serving(self) -> str:
        return f"release {self.current.number}" if self.current else "no release"

    def make_tables(self) -> None:
        """Run the jobs, each on exactly what the one before published."""
        config = self.config
        embed = config.embed
        pool = plan_embed_pool(embed)
        dtype = compute_dtype(embed.wanted_dtype, pool.gpus_per_actor)
        config = replace(config, embed=replace(embed, dtype=dtype))
        directory = model_directory(config.embed)
        self._done("vectors", directory, embed_corpus(config.embed_step(directory)))
        indexing = config.index_step(directory, self.tables["vectors"])
        self._done("index", directory, build_index(indexing))
        for name in config.precomputed:
            step = config.precompute_step(name, directory, self.tables["index"])
            self._done(name, directory, precompute(step))

    def _done(self, name: str, directory: str, summary: dict[str, Any]) -> None:
        self.steps[name] = summary
        self.tables[name] = TableRef(path=f"{directory}/{name}", generation=summary["generation"])

    def _release(self) -> dict[str, Any]:
        made = publish_release(
            self.storage,
            self.tables,
            current=self.current,
            config=asdict(self.config),
            gates=self.steps["gates"],
        )
        return {"release": made.number, "released": True, **self.summary()}

    def _unreleased(self) -> dict[str, Any]:
        number = self.current.number if self.current else None
        return {"release": number, "released": False, **self.summary()}

    def summary(self) -> dict[str, Any]:
        """Return what was done so far."""
        return {
            "compared_with": self.last.number if self.last else None,
            "tables": {name: asdict(ref) for name, ref in self.tables.items()},
            **self.steps,
            "seconds": round(time.perf_counter() - self.started, 3),
        }

    def write_report(self, report: dict[str, Any]) -> None:
        """Write what happened beside the releases."""
        write_report(self.storage, "night", report, partial(release_trend, self.storage))
