"""The second step of precomputing: a run becomes a run of candidates.

Each block of queries is a unit. Actors hold what is known of every indexed row (index.items): a
candidate is looked up by its row, which the run carries, so no join is needed.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qbatch.errors import SourceChangedError
from qbatch.index.columns import VectorColumn
from qbatch.index.items import ItemRows, ItemTable, needed_columns
from qbatch.index.selecting import SelectionOptions, select_candidates
from qbatch.index.stored import stored_shards
from qbatch.manifest import (
    Generation,
    fingerprint_id,
    latest_generation,
    publish_change,
    read_verified,
)
from qbatch.pipelines.cluster import MAX_RETRIES, cluster_resources
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.index_parts import read_part
from qbatch.pipelines.index_resources import largest_node
from qbatch.pipelines.search_queries import QueryBlock
from qbatch.pipelines.tasks import results_as_completed
from qbatch.pipelines.unit_files import OUTPUTS, listed_files, store_plan, write_unit_file
from qbatch.schema import FILES, UNITS
from qbatch.storage import Storage
from qbatch.tables import PublishedTable, open_vectors

log = logging.getLogger(__name__)

_CPUS_PER_ACTOR = 8
"""Each actor has its own copy of the vectors on the local disk; few of them share a machine."""

_PROCESS_BYTES = 600 * 2**20

_ROW_BYTES = 48
"""Of memory for each indexed row, while the table is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidatesTask:
    """What every process of this step needs to know."""

    output: str
    run: PublishedTable
    vectors: PublishedTable
    """Of the index, at the index's generation."""
    parts: list[dict[str, Any]]
    """The vectors files in the row order of the index."""
    column: VectorColumn
    options: SelectionOptions

    @classmethod
    def of(
        cls, run: PublishedTable, index: PublishedTable, options: SelectionOptions, output: str
    ) -> "CandidatesTask":
        """Look up what the index was built from.

        Raises:
            SourceChangedError: The run was made from another generation of the index.
        """
        fingerprint, vectors = index.generation.fingerprint, index.generation.details["vectors"]
        shards = stored_shards(index.storage, index.generation)
        searched = fingerprint_id({"keys": tuple(shard.key for shard in shards)})
        if run.generation.fingerprint["shards"] != searched:
            raise SourceChangedError(
                f"generation {index.generation.number} of {index.storage.uri} was replaced while "
                "it was searched. Run the job again"
            )
        return cls(
            output=output,
            run=run,
            vectors=open_vectors(vectors["uri"], vectors["generation"]),
            parts=[part for shard in shards for part in shard.parts],
            column=VectorColumn.of(fingerprint["embedding"], fingerprint["dim"]),
            options=options,
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the candidates."""
        return {"run": dict(self.run.generation.fingerprint), "selection": asdict(self.options)}

    @property
    def num_rows(self) -> int:
        """Of the index."""
        return sum(part["rows"] for part in self.parts)

    def items(self) -> ItemTable | None:
        """Read the indexed rows; None when the options need none."""
        options = self.options
        column = self.column if options.diversity else None
        if column is None and not options.are_items:
            return None
        names = needed_columns(column, options.same)
        tables = (read_part(self.vectors, part, names) for part in self.parts)
        return ItemTable(tables, rows=self.num_rows, column=column, group_column=options.same)


class CandidatesActor:
    """Holds the indexed rows and selects the candidates of blocks."""

    def __init__(self, task: CandidatesTask) -> None:
        self._task = task
        self._items = task.items()
        self._asking: tuple[str, ItemRows] | None = None

    def select(self, unit: dict[str, Any], unit_key: str) -> dict[str, Any]:
        """Write the candidates of one unit of the run; return its row of OUTPUTS."""
        task = self._task
        run = task.run.read_file(unit)
        asking = self._asking_rows(QueryBlock.from_json(unit["spans"]))
        found = select_candidates(run, self._items, task.options, asking=asking)
        record = {
            "unit_key": unit_key,
            "fingerprint": fingerprint_id(task.fingerprint),
            "counts": {"found": run.num_rows, "kept": found.num_rows},
            "rejects": None,
        }
        return write_unit_file(Storage(task.output), record, found)

    def _asking_rows(self, block: QueryBlock) -> ItemRows | None:
        """Return what is known of the file of queries, if they are items; the last one is kept."""
        options = self._task.options
        if self._items is None or not options.are_items:
            return None
        if self._asking is None or self._asking[0] != block.path:
            entry = {"path": block.path, "sha256": block.version}
            table = self._task.vectors.read_file(entry, needed_columns(None, options.same))
            self._asking = block.path, self._items.rows_of(table)
        return self._asking[1]


def make_candidates(
    task: CandidatesTask, config: dict[str, Any], *, stall_timeout_s: float, single_writer: bool
) -> Generation:
    """Select what is missing and publish the candidates as a run.

    Args:
        task: From ``CandidatesTask.of``.
        config: Of the job, for the manifest.
        stall_timeout_s: Seconds without a finished block after which the job gives up.
        single_writer: As in ``Storage``.
    """
    storage = Storage(task.output, single_writer=single_writer)
    current = latest_generation(storage)
    units = _planned_units(task)
    keys = pa.chunked_array([pa.array(list(units), pa.string())])
    done = finished_units(storage, keys, current)
    known = set(done["unit_key"].to_pylist())
    pending = {key: unit for key, unit in units.items() if key not in known}
    log.info("%d blocks of candidates planned, %d finished already", len(units), len(known))
    made = list(_select(task, pending, stall_timeout_s)) if pending else []
    outputs = pa.concat_tables([done, pa.Table.from_pylist(made, schema=OUTPUTS)])
    by_key = {row["unit_key"]: row for row in outputs.to_pylist()}
    plan = [{**by_key[key], "spans": unit["spans"]} for key, unit in units.items()]
    draft = Generation(
        kind="run",
        fingerprint=task.fingerprint,
        config=config,
        counts=_counts(task.run.generation, outputs),
        files=listed_files(outputs),
        rejects=FILES.empty_table(),
        plan=store_plan(storage, pa.Table.from_pylist(plan, schema=UNITS)),
    )
    return publish_change(storage, draft, current)


def _counts(run: Generation, outputs: pa.Table) -> dict[str, int]:
    counts = [json.loads(text.as_py()) for text in outputs["counts"]]
    return {
        "queries": run.counts["queries"],
        "searched": run.counts["searched"],
        **{name: sum(unit[name] for unit in counts) for name in ("found", "kept")},
    }


def _planned_units(task: CandidatesTask) -> dict[str, dict[str, Any]]:
    """Return the units of the run by the keys of what is made from them."""
    data = read_verified(task.run.storage, task.run.generation.plan or {})
    columns = ["spans", *FILES.names]
    fingerprint = fingerprint_id(task.fingerprint)
    return {
        fingerprint_id({**unit, "fingerprint": fingerprint}): unit
        for unit in pq.read_table(pa.BufferReader(data), columns=columns).to_pylist()
    }


def _select(
    task: CandidatesTask, units: dict[str, dict[str, Any]], stall_timeout_s: float
) -> Iterator[dict[str, Any]]:
    num_cpus = max(1, min(_CPUS_PER_ACTOR, largest_node().cpus))
    num_actors = min(len(units), max(1, int(cluster_resources().get("CPU", 1)) // num_cpus))
    actor_class = ray.remote(CandidatesActor).options(
        num_cpus=num_cpus,
        memory=_PROCESS_BYTES + _ROW_BYTES * task.num_rows,
        max_restarts=-1,
        max_task_retries=MAX_RETRIES,
    )
    actors: list[Any] = [actor_class.remote(task) for _ in range(num_actors)]
    refs = [
        actors[i % num_actors].select.remote(unit, key)
        for i, (key, unit) in enumerate(units.items())
    ]
    yield from results_as_completed(refs, stall_timeout_s=stall_timeout_s)
