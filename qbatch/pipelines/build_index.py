"""The index job: a published vectors table becomes a published, sharded FAISS index.

sample and train once -> build the shards that do not exist -> measure recall -> publish if it is
good enough. Killed anywhere, it goes on where it stopped.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.errors import ConfigError, IntegrityError, NoInputError
from qbatch.index.columns import VectorColumn
from qbatch.index.device import has_gpu_kernels
from qbatch.index.factory import effort_name
from qbatch.index.memory import MemoryPlan
from qbatch.index.recall import TUNED_DEPTH
from qbatch.index.training import check_trainable
from qbatch.manifest import (
    Generation,
    latest_generation,
    publish_change,
    read_verified,
)
from qbatch.pipelines.cluster import ray_session
from qbatch.pipelines.index_changes import find_changes
from qbatch.pipelines.index_parts import (
    ShardPlan,
    assign_shards,
    changed_shards,
    list_parts,
    planned_shard,
)
from qbatch.pipelines.index_recall import Measured, measure, row_bases
from qbatch.pipelines.index_resources import (
    Node,
    book_shard_task,
    check_fits,
    default_num_shards,
    largest_node,
)
from qbatch.pipelines.index_shards import build_missing, finished_shards
from qbatch.pipelines.index_task import SIDECAR_COLUMNS, IndexTask, Training
from qbatch.pipelines.index_training import TrainingRequest, choose, train
from qbatch.pipelines.unit_files import store_plan
from qbatch.report.writing import write_report
from qbatch.schema import FILES, SCHEMA_VERSION, SHARDS
from qbatch.storage import Storage, probe
from qbatch.tables import PublishedTable, open_vectors

log = logging.getLogger(__name__)

_BUDGET_SHARE = 0.6
"""Of the memory that the largest node lets tasks book: the default budget of an index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildIndexConfig:
    """Build a sharded FAISS index of a published vectors table."""

    vectors: str
    """Directory of the vectors table."""
    vectors_generation: int | None = None
    """Which generation of the vectors is indexed; None is the newest."""
    output: str
    """Directory of the index."""
    factory: str = "auto"
    """FAISS factory string, such as Flat or IVF4096,SQ8; auto chooses and says why."""
    dim: int | None = None
    """Width to index, for tables with several; None is the first."""
    target_recall: float = 0.95
    """Recall@10 against exact search below which nothing is published."""
    memory_budget_gib: float | None = None
    """Memory for the whole index when it is searched; None is 60 % of the largest node's."""
    gpu_memory_gib: float = 24.0
    """Memory of one GPU, for the plan; ignored without GPUs."""
    num_shards: int | None = None
    """None keeps the number of the last generation, or chooses one."""
    num_probes: int = 1000
    """Vectors that recall is measured with; they are held out of training."""
    seed: int = 0
    """Of the sample and the clustering."""
    retrain: bool = False
    """Train again although the last generation's template fits."""
    max_delta_share: float = 0.0
    """Share of the rows up to which changed ones lie in shards of their own, and old ones are
    skipped; above it the shards of changed files are built anew. 0 always builds them anew."""
    stall_timeout_s: float = 7200.0
    """Seconds without a finished shard after which the job ends with code 6."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""
    dry_run: bool = False
    """Print the plan; build nothing."""

    def __post_init__(self) -> None:
        if not 0 < self.target_recall <= 1:
            raise ConfigError(f"target_recall is {self.target_recall}; give more than 0, up to 1")
        for name in ("dim", "memory_budget_gib", "num_shards", "num_probes", "stall_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; give more than 0")
        if not 0 <= self.max_delta_share < 1:
            raise ConfigError(
                f"max_delta_share is {self.max_delta_share}; give 0 (off) up to less than 1"
            )


def build_index(config: BuildIndexConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    table = open_vectors(config.vectors, config.vectors_generation)
    storage = Storage(config.output, single_writer=config.single_writer)
    if not config.dry_run:
        probe(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s):
        build = _Build.of(config, table, storage)
        if config.dry_run:
            return build.estimate()
        built = build.run()
        if not built.is_good_enough and built.training == build.kept_training():
            log.warning("recall fell below the target: the vectors have moved, training again")
            build = replace(build, config=replace(config, retrain=True))
            built = build.run()
    built.measured.check(config.target_recall)
    draft = build.draft(built)
    published = publish_change(storage, draft, build.current)
    recall = built.measured.recall
    summary = {
        "generation": published.number,
        "ntotal": draft.counts["ntotal"],
        "factory": built.training.factory,
        "reason": built.training.reason,
        "num_shards": len(built.records),
        "shards_made": built.num_made,
        "shards_reused": len(built.records) - built.num_made,
        "delta": draft.details["delta"],
        "recall": {str(depth): round(r.mean, 4) for depth, r in recall.items()},
        "search": draft.details["search"],
        "seconds": {**built.seconds, "total": round(time.perf_counter() - started, 3)},
    }
    write_report(storage, "index", summary, partial(_details, draft, built))
    return summary


@dataclass(frozen=True, kw_only=True, slots=True)
class _Built:
    """An index that is not published yet."""

    training: Training
    shards: list[ShardPlan]
    records: list[dict[str, Any]]
    """Completion records of the shards, in row order."""
    num_made: int
    """Shards that were built now."""
    measured: Measured
    target_recall: float
    seconds: dict[str, float]

    @property
    def is_good_enough(self) -> bool:
        """Recall reaches the target."""
        return self.measured.recall[TUNED_DEPTH].mean >= self.target_recall


@dataclass(frozen=True, kw_only=True, slots=True)
class _Build:
    """What the steps of one build share."""

    config: BuildIndexConfig
    table: PublishedTable
    column: VectorColumn
    parts: pa.Table
    """schema.PARTS: the vectors files."""
    storage: Storage
    current: Generation | None
    """The newest generation of the index."""
    node: Node

    @classmethod
    def of(cls, config: BuildIndexConfig, table: PublishedTable, storage: Storage) -> "_Build":
        """Look at vectors, cluster and what was published before."""
        parts = list_parts(table)
        if not len(parts):
            raise NoInputError(f"no vectors in {config.vectors}; embed something first")
        return cls(
            config=config,
            table=table,
            column=VectorColumn.of(table.generation.fingerprint, config.dim),
            parts=parts,
            storage=storage,
            current=latest_generation(storage),
            node=largest_node(),
        )

    @property
    def ntotal(self) -> int:
        """Vectors in all."""
        return int(self.parts["rows"].to_numpy().sum())

    @property
    def budget_bytes(self) -> int:
        """What the index may take when it is searched."""
        if self.config.memory_budget_gib is None:
            return int(_BUDGET_SHARE * self.node.memory)
        return int(self.config.memory_budget_gib * 2**30)

    @property
    def request(self) -> TrainingRequest:
        """What to train."""
        return TrainingRequest(
            factory=self.config.factory,
            column=self.column,
            seed=self.config.seed,
            num_probes=min(self.config.num_probes, max(1, self.ntotal // 4)),
            target_recall=self.config.target_recall,
            budget_bytes=self.budget_bytes,
        )

    def run(self) -> _Built:
        """Train, build what is missing, measure."""
        started = time.perf_counter()
        training = self.train()
        trained_at = time.perf_counter()
        task = self.task(training)
        shards = self._with_delta(task) or self._from_files(training)
        records, num_made = self.make_shards(task, shards)
        built_at = time.perf_counter()
        target = self.config.target_recall
        measured = measure(self.storage, records, target, [shard.dead for shard in shards])
        return _Built(
            training=training,
            shards=shards,
            records=records,
            num_made=num_made,
            measured=measured,
            target_recall=target,
            seconds={
                "train": round(trained_at - started, 3),
                "build": round(built_at - trained_at, 3),
                "measure": round(time.perf_counter() - built_at, 3),
            },
        )

    def train(self) -> Training:
        """Return the template and probes of the last generation if they fit, else new ones."""
        kept = self.kept_training()
        if kept is not None:
            return kept
        if (factory := self.config.factory) != "auto":
            check_trainable(factory, self.column.dim, self.column.metric, self.ntotal)
            self.check_fits(factory, self._even_rows(factory))
        return train(self.request, self.table, self.parts, self.storage)

    def kept_training(self) -> Training | None:
        """Return the training of the last generation if it is that of this build."""
        if self.current is None or self.config.retrain:
            return None
        training = Training(**self.current.details["training"])
        fingerprint = index_fingerprint(self.table.generation, self.column, training)
        if training.requested != self.config.factory or fingerprint != self.current.fingerprint:
            return None
        log.info("the template of generation %d stays: %s", self.current.number, training.factory)
        return training

    def task(self, training: Training) -> IndexTask:
        """Return what all processes of the build share."""
        return IndexTask(
            output=self.config.output,
            vectors=self.config.vectors,
            generation=self.table.generation,
            column=self.column,
            columns=self._sidecar_columns(),
            target_recall=self.config.target_recall,
            training=training,
        )

    def _with_delta(self, task: IndexTask) -> list[ShardPlan] | None:
        """Return the shards as they are, the rows that went marked, and one more for new rows.

        None if the shards of changed files have to be built anew.
        """
        if not self.config.max_delta_share or self.kept_training() != task.training:
            return None
        plan = self._published_plan()
        shards = [planned_shard(row) for row in plan]
        before = self._parts_before()
        keys = [shard.key(task.shard_fingerprint) for shard in shards]
        if before is None or keys != [row["shard_key"] for row in plan]:
            return None
        changes = find_changes(
            task, before, self.parts, plan, stall_timeout_s=self.config.stall_timeout_s
        )
        if changes is None:
            return None
        shards = changed_shards(shards, changes.parts, changes.dead)
        share = _delta_facts(shards)["share"]
        if share > self.config.max_delta_share:
            log.info("%.1f %% of the rows changed: building their shards anew", 100 * share)
            return None
        return shards

    def _parts_before(self) -> pa.Table | None:
        """Return the vectors files that the last generation was built from; None if unknown."""
        source = self.current.details["vectors"] if self.current else None
        if source is None or source["uri"] != self.table.storage.uri:
            return None
        try:
            return list_parts(open_vectors(source["uri"], source["generation"]))
        except (FileNotFoundError, IntegrityError) as error:
            log.warning("%s: changes cannot be told, shards are built anew", error)
            return None

    def _published_plan(self) -> list[dict[str, Any]]:
        """Return schema.SHARDS of the last generation; [] without one."""
        if self.current is None or self.current.plan is None:
            return []
        plan = pq.read_table(pa.BufferReader(read_verified(self.storage, self.current.plan)))
        rows: list[dict[str, Any]] = plan.to_pylist()
        return rows

    def _from_files(self, training: Training) -> list[ShardPlan]:
        """Place the vectors files, each where it was before if the number of shards stays."""
        before = self._places_before()
        num_before = max(before.values(), default=-1) + 1
        num_shards = self.config.num_shards or num_before or self._default_shards(training.factory)
        shards = assign_shards(self.parts, num_shards, before if num_shards == num_before else None)
        self.check_fits(training.factory, max(shard.rows for shard in shards))
        return shards

    def _places_before(self) -> dict[str, int]:
        """Return the shard of each part by name in the last generation."""
        return {
            part["name"]: shard["shard"]
            for shard in self._published_plan()
            for part in shard["parts"]
            if not shard["delta"]
        }

    def _default_shards(self, factory: str) -> int:
        return default_num_shards(self.memory_plan(factory, self.ntotal), self.ntotal, self.node)

    def _even_rows(self, factory: str) -> int:
        return -(-self.ntotal // (self.config.num_shards or self._default_shards(factory)))

    def memory_plan(self, factory: str, shard_rows: int) -> MemoryPlan:
        """Return what the build needs if its largest shard has so many rows."""
        return MemoryPlan.of(
            factory,
            self.column,
            ntotal=self.ntotal,
            shard_rows=shard_rows,
            part_rows=int(self.parts["rows"].to_numpy().max()),
            num_probes=self.request.num_probes,
        )

    def check_fits(self, factory: str, shard_rows: int) -> None:
        """Raise ConfigError if the cluster or the budget is too small."""
        check_fits(
            self.memory_plan(factory, shard_rows),
            self.node_for(factory),
            budget_bytes=self.budget_bytes,
            gpu_bytes=int(self.config.gpu_memory_gib * 2**30),
        )

    def node_for(self, factory: str) -> Node:
        """Return the largest node, without its GPUs if they have no code for a factory."""
        usable = has_gpu_kernels(factory, self.column.dim, self.column.metric)
        return self.node if usable else replace(self.node, gpus=0)

    def make_shards(
        self, task: IndexTask, shards: Sequence[ShardPlan]
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the completion record of each shard in order, and how many were built now."""
        training = task.training
        keys = [shard.key(task.shard_fingerprint) for shard in shards]
        done = finished_shards(self.storage, keys, self._published_records())
        missing = {key: s for key, s in zip(keys, shards, strict=True) if key not in done}
        log.info("%d shards planned, %d of them finished already", len(shards), len(done))
        if missing:
            plan = self.memory_plan(training.factory, max(shard.rows for shard in shards))
            booking = book_shard_task(plan, self.node_for(training.factory), len(missing))
            for record in build_missing(
                replace(task, num_threads=booking.num_cpus),
                missing,
                booking=booking,
                stall_timeout_s=self.config.stall_timeout_s,
            ):
                done[record["shard_key"]] = record
        records = [done[key] for key in keys]
        self._check_conservation(records, sum(len(shard.dead) for shard in shards))
        return records, len(missing)

    def _sidecar_columns(self) -> tuple[str, ...]:
        return (*SIDECAR_COLUMNS, *self.table.generation.config.get("keep_columns", ()))

    def _published_records(self) -> dict[str, dict[str, Any]]:
        return {shard["shard_key"]: shard_record(shard) for shard in self._published_plan()}

    def _check_conservation(self, records: Sequence[Mapping[str, Any]], num_dead: int) -> None:
        indexed = sum(record["index"]["rows"] for record in records) - num_dead
        if indexed != self.ntotal:
            raise IntegrityError(
                f"{self.ntotal} vectors were planned, {indexed} indexed; nothing was published. "
                "This is a bug: report it with the log"
            )

    def draft(self, built: _Built) -> Generation:
        """Return the generation to publish."""
        training, records = built.training, built.records
        names = ("index", "ids", "probes")
        files = [record[name] for record in records for name in names]
        vectors = self.table.generation
        return Generation(
            kind="index",
            fingerprint=index_fingerprint(vectors, self.column, training),
            config=asdict(self.config),
            counts={"ntotal": self.ntotal, "shards": len(records)},
            files=pa.Table.from_pylist(
                [*files, training.template, training.probes], schema=FILES
            ).sort_by("path"),
            rejects=FILES.empty_table(),
            plan=self._write_plan(built.shards, records),
            details={
                "vectors": {"uri": self.table.storage.uri, "generation": vectors.number},
                "embedding": {name: vectors.config.get(name) for name in ("model", "revision")},
                "columns": list(self._sidecar_columns()[len(SIDECAR_COLUMNS) :]),
                "training": asdict(training),
                "search": _search_settings(training.factory, built.measured.effort),
                "delta": _delta_facts(built.shards),
                **built.measured.as_details(),
            },
        )

    def _write_plan(
        self, shards: Sequence[ShardPlan], records: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        rows = [
            {
                **record,
                "shard": shard.number,
                "row_base": base,
                "rows": shard.rows,
                "facts": json.dumps(record["facts"]),
                "parts": shard.parts,
                "dead": list(shard.dead),
                "delta": shard.is_delta,
            }
            for shard, record, base in zip(shards, records, row_bases(records), strict=True)
        ]
        return store_plan(self.storage, pa.Table.from_pylist(rows, schema=SHARDS))

    def estimate(self) -> dict[str, Any]:
        """Return what a build would need, for ``--dry-run``."""
        factory = self.config.factory
        if factory == "auto":
            choice = choose(self.request, self.table, self.parts)
            factory, reason = choice.factory, choice.reason
        else:
            reason = "as asked for"
        rows = self._even_rows(factory)
        self.check_fits(factory, rows)
        plan = self.memory_plan(factory, rows)
        return {
            "ntotal": self.ntotal,
            "factory": factory,
            "reason": reason,
            "num_shards": -(-self.ntotal // rows),
            "index_gib": round(plan.index / 2**30, 3),
            "shard_task_gib": round(plan.shard / 2**30, 3),
            "training_gib": round(plan.training / 2**30, 3),
        }


def _details(draft: Generation, built: _Built) -> dict[str, Any]:
    """Return what the manifest keeps, and what the shards are like."""
    shards = [
        {
            "rows": shard.rows,
            "dead": len(shard.dead),
            "delta": shard.is_delta,
            "bytes": record["index"]["bytes"],
            "lists": record["facts"]["lists"],
        }
        for shard, record in zip(built.shards, built.records, strict=True)
    ]
    return {**draft.details, "shards": shards}


def _search_settings(factory: str, effort: int) -> dict[str, int]:
    """Return how hard the index is to be searched; {} where every search is exact."""
    name = effort_name(factory)
    return {name: effort} if name else {}


def _delta_facts(shards: Sequence[ShardPlan]) -> dict[str, float]:
    """Return the rows of delta shards, dead rows of all, and the larger one's share of the rest."""
    rows = sum(shard.rows for shard in shards if shard.is_delta)
    dead = sum(len(shard.dead) for shard in shards)
    live = sum(shard.rows for shard in shards) - dead
    return {"rows": rows, "dead": dead, "share": round(max(rows, dead) / max(live, 1), 6)}


def index_fingerprint(
    vectors: Generation, column: VectorColumn, training: Training
) -> dict[str, Any]:
    """Return what makes shards fit together: whose vectors, which width, which template."""
    return {
        "schema_version": SCHEMA_VERSION,
        "embedding": dict(vectors.fingerprint),
        "dim": column.dim,
        "metric": column.metric,
        "factory": training.factory,
        "template_sha256": training.template["sha256"],
    }


def shard_record(shard: Mapping[str, Any]) -> dict[str, Any]:
    """Return the completion record that a row of schema.SHARDS keeps."""
    names = ("shard_key", "index", "ids", "probes")
    return {**{name: shard[name] for name in names}, "facts": json.loads(shard["facts"])}
