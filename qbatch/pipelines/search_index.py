"""The search job: queries and a published index become a published run.

embed the queries if they are texts -> search every block of queries in every shard -> merge ->
check that every query is accounted for -> publish. Killed anywhere, it goes on where it stopped.
"""

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from qbatch.corpus.config import Format
from qbatch.errors import ConfigError, IntegrityError, NoInputError
from qbatch.index.columns import VectorColumn, check_same_space, weights_of
from qbatch.index.device import has_gpu_kernels
from qbatch.index.filters import filter_columns
from qbatch.index.searching import SearchOptions
from qbatch.index.stored import StoredShard, stored_shards
from qbatch.manifest import (
    Generation,
    latest_generation,
    publish_change,
)
from qbatch.pipelines.cluster import MAX_RETRIES, ray_session
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus, planned_fingerprint
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.index_resources import largest_node
from qbatch.pipelines.search_actor import merge_block, partial_key
from qbatch.pipelines.search_queries import QueryBlock, QuerySource, parquet_objects
from qbatch.pipelines.search_schedule import SearchPool, plan_search, search_blocks
from qbatch.pipelines.search_task import SearchTask
from qbatch.pipelines.tasks import results_as_completed
from qbatch.pipelines.unit_files import (
    OUTPUTS,
    list_partials,
    listed_files,
    listed_rejects,
    store_plan,
)
from qbatch.report.ranking import run_details
from qbatch.report.writing import write_report
from qbatch.schema import UNITS
from qbatch.storage import Storage, open_object, probe
from qbatch.tables import PublishedTable, open_table, open_vectors

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchIndexConfig:
    """Search a published index with many queries."""

    index: str
    """Directory of the index."""
    index_generation: int | None = None
    """Which generation of the index is searched; None is the newest."""
    queries: str
    """Texts (any corpus format), Parquet with vectors, or a published vectors table."""
    queries_generation: int | None = None
    """Which generation of a vectors table asks; None is the newest."""
    output: str
    """Directory of the run."""
    id_column: str = "query_id"
    """Column of the query's id."""
    text_column: str = "text"
    """Column of the query's text."""
    vector_column: str | None = None
    """Column of vectors in Parquet files; None embeds texts, or takes a vectors table."""
    format: Format = "auto"
    """How to read texts; auto goes by names."""
    instruction: str | None = None
    """Task sentence for text queries; None is the model's own."""
    model: str | None = None
    """Where the index's model lies here; None is where it lay when the corpus was embedded."""
    revision: str | None = None
    """Commit of a hub id."""
    top_k: int = 10
    """Documents a query."""
    nprobe: int | None = None
    """Inverted lists visited (ef_search of a graph); None is what the build found necessary."""
    rescore: int = 0
    """Exact scores from the stored vectors for this many times top_k candidates of each shard."""
    exclude_self: bool = False
    """Leave out the document whose id is the query's id, for item-to-item search."""
    locate: bool = False
    """Write where queries and passages lie as well (schema.LOCATED_RUN), for jobs that go on."""
    filter: str | None = None
    """Over kept columns, such as: lang == "en" and year >= 2020."""
    tombstones: str | None = None
    """Parquet files whose doc_id column names documents that must not be found any more."""
    stall_timeout_s: float = 1800.0
    """Seconds without any progress after which the job ends with code 6."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""
    dry_run: bool = False
    """Print the plan; search nothing."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("nprobe", 1), ("rescore", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; give {least} or more")
        if self.filter is not None:
            filter_columns(self.filter)


def search_index(config: SearchIndexConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    index = open_index_table(config.index, config.index_generation)
    _check_filter(config, index.generation)
    storage = Storage(config.output, single_writer=config.single_writer)
    if not config.dry_run:
        probe(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s):
        if config.dry_run and _are_texts(config):
            return {"embed_queries": embed_corpus(embed_config(config, index.generation))}
        if _are_texts(config):
            _embed_texts(config, index.generation)
        source = query_source(config, index.generation)
        embedded_at = time.perf_counter()
        shards = stored_shards(index.storage, index.generation)
        search = _Search(
            config=config,
            task=_make_task(config, index, source, shards),
            shards=shards,
            storage=storage,
            factory=index.generation.fingerprint["factory"],
        )
        if config.dry_run:
            return search.estimate()
        outputs, seconds = search.run()
    counts = total_counts(outputs)
    published = publish_change(storage, search.draft(outputs, counts), latest_generation(storage))
    summary = {
        "generation": published.number,
        "queries": counts["queries"],
        "rows": pc.sum(outputs["rows"]).as_py() or 0,
        "rejected": counts["rejected"],
        "without_hits": counts["without_hits"],
        "seconds": {
            "embed": round(embedded_at - started, 3),
            **seconds,
            "total": round(time.perf_counter() - started, 3),
        },
    }
    write_report(storage, "run", summary, lambda: run_details(PublishedTable(storage, published)))
    return summary


def open_index_table(uri: str, generation: int | None = None) -> PublishedTable:
    """Open a published index at its newest generation, or at a given one.

    Raises:
        NoInputError: Nothing is published there.
        ConfigError: What is published there is no index.
    """
    table = open_table(uri, generation)
    if table.generation.kind != "index":
        raise ConfigError(
            f"{uri} holds {table.generation.kind}, not an index; give the --output of "
            "build_index.py"
        )
    return table


def _check_filter(config: SearchIndexConfig, index: Generation) -> None:
    columns = filter_columns(config.filter) if config.filter else []
    known = ["doc_id", "passage_id", *index.details["columns"]]
    missing = [name for name in columns if name not in known]
    if missing:
        raise ConfigError(
            f"--filter looks at {missing}, the index keeps {known}; keep the column with "
            "--keep-columns when embedding, and build the index again"
        )


def query_source(config: SearchIndexConfig, index: Generation) -> QuerySource:
    """Return where the query vectors lie; those of texts, once they are embedded.

    Raises:
        ConfigError: The queries belong to another model than the index.
    """
    embedding, dim = index.fingerprint["embedding"], index.fingerprint["dim"]
    if config.vector_column is not None:
        column = replace(VectorColumn.of(embedding, dim), name=config.vector_column)
        return QuerySource(
            uri=config.queries, generation=None, id_column=config.id_column, column=column
        )
    is_embedded_here = _are_texts(config)
    uri = embed_config(config, index).output if is_embedded_here else config.queries
    number = None if is_embedded_here else config.queries_generation
    published = open_vectors(uri, number).generation
    if published.kind != "vectors":
        raise ConfigError(
            f"--queries={uri} holds {published.kind}; give texts, vectors or a vectors table"
        )
    check_same_space(embedding, published.fingerprint)
    column = VectorColumn.of(published.fingerprint, dim)
    return QuerySource(uri=uri, generation=published, id_column="doc_id", column=column)


def _are_texts(config: SearchIndexConfig) -> bool:
    """Tell whether the queries have to be embedded: they are no vectors in either form."""
    return config.vector_column is None and latest_generation(Storage(config.queries)) is None


def _embed_texts(config: SearchIndexConfig, index: Generation) -> None:
    """Embed the queries beside the run, as the index's documents were."""
    embed = embed_config(config, index)
    check_same_space(index.fingerprint["embedding"], planned_fingerprint(embed))
    log.info("embedding the queries with %s", embed.model)
    embed_corpus(embed)


def embed_config(config: SearchIndexConfig, index: Generation) -> EmbedCorpusConfig:
    """Return how text queries are embedded: everything but the prompt is the index's own."""
    embedding, source = index.fingerprint["embedding"], index.details["embedding"]
    return EmbedCorpusConfig(
        input=config.queries,
        output=f"{config.output.rstrip('/')}/query-vectors",
        model=config.model or source["model"],
        revision=config.revision if config.model else source["revision"],
        format=config.format,
        id_column=config.id_column,
        text_column=config.text_column,
        instruction=config.instruction,
        queries=True,
        max_tokens=embedding["max_tokens"],
        dtype=embedding["dtype"],
        weights=weights_of(embedding),
        dims=(index.fingerprint["dim"],),
        stall_timeout_s=config.stall_timeout_s,
        single_writer=config.single_writer,
        dry_run=config.dry_run,
    )


def _make_task(
    config: SearchIndexConfig,
    index: PublishedTable,
    source: QuerySource,
    shards: Sequence[StoredShard],
) -> SearchTask:
    generation = index.generation
    effort = next(iter(generation.details["search"].values()), 0)
    vectors = generation.details["vectors"]
    return SearchTask(
        output=config.output,
        index=config.index,
        column=VectorColumn.of(generation.fingerprint["embedding"], generation.fingerprint["dim"]),
        options=SearchOptions(
            top_k=config.top_k, effort=config.nprobe or effort, rescore=config.rescore
        ),
        source=source,
        exclude_self=config.exclude_self,
        locate=config.locate,
        filter=config.filter,
        tombstones=_read_tombstones(config.tombstones),
        vectors=vectors["uri"],
        vectors_generation=(
            open_vectors(vectors["uri"], vectors["generation"]).generation
            if config.rescore
            else None
        ),
        index_fingerprint=dict(generation.fingerprint),
        shard_keys=tuple(shard.key for shard in shards),
    )


def _read_tombstones(uri: str | None) -> pa.Array:
    if uri is None:
        return pa.array([], pa.large_string())
    found = []
    for object_uri, _ in parquet_objects(uri):
        with open_object(object_uri) as file:
            found.append(pq.read_table(file, columns=["doc_id"]))
    if not found:
        raise NoInputError(f"no Parquet files in --tombstones={uri}; give a doc_id column")
    ids = pa.concat_tables(found)["doc_id"].cast(pa.large_string()).combine_chunks()
    return pc.unique(ids.drop_null()).sort()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """What the steps of one search share."""

    config: SearchIndexConfig
    task: SearchTask
    shards: list[StoredShard]
    storage: Storage
    factory: str

    def run(self) -> tuple[pa.Table, dict[str, float]]:
        """Search what is missing; return OUTPUTS of all blocks, and seconds by stage."""
        keys = {block.key(self.task.run_fingerprint): block for block in self._blocks()}
        current = latest_generation(self.storage)
        done = finished_units(
            self.storage, pa.chunked_array([pa.array(list(keys), pa.string())]), current
        )
        known = set(done["unit_key"].to_pylist())
        pending = [block for key, block in keys.items() if key not in known]
        log.info("%d blocks of queries planned, %d of them finished already", len(keys), len(known))
        made: list[dict[str, Any]] = []
        seconds: defaultdict[str, float] = defaultdict(float)
        spans: list[tuple[float, float]] = []
        if pending:
            for result in self._search(pending):
                spans.append(result["span"])
                for stage, value in result["seconds"].items():
                    seconds[stage] += value
                if result["output"] is not None:
                    made.append(result["output"])
        outputs = pa.concat_tables([done, pa.Table.from_pylist(made, schema=OUTPUTS)])
        _check_complete(outputs, list(keys))
        if spans:  # from the first shards that were ready to the last block that was done
            seconds["searching"] = max(end for _, end in spans) - min(start for start, _ in spans)
        return outputs, {stage: round(value, 3) for stage, value in seconds.items()}

    def _pool(self, num_blocks: int) -> SearchPool:
        node = largest_node()
        if not has_gpu_kernels(self.factory, self.task.column.dim, self.task.column.metric):
            node = replace(node, gpus=0)
        return plan_search(self.shards, node, num_blocks)

    def _search(self, blocks: list[QueryBlock]) -> Iterator[dict[str, Any]]:
        pool = self._pool(len(blocks))
        task = replace(self.task, num_threads=pool.num_cpus)
        partials = list_partials(self.storage) if len(pool.groups) > 1 else {}
        work = {
            group: [
                (block, missing)
                for block in blocks
                if (
                    missing := [
                        s.number for s in shards if partial_key(task, block, s) not in partials
                    ]
                )
            ]
            for group, shards in enumerate(pool.groups)
        }
        stall_timeout_s = self.config.stall_timeout_s
        yield from search_blocks(task, pool, work, stall_timeout_s=stall_timeout_s)
        if len(pool.groups) > 1:
            partials = list_partials(self.storage)
            merge = ray.remote(max_retries=MAX_RETRIES)(merge_block)
            shared = ray.put(task)
            refs = [
                merge.remote(
                    shared, block, [partials[partial_key(task, block, s)] for s in self.shards]
                )
                for block in blocks
            ]
            for output in results_as_completed(refs, stall_timeout_s=stall_timeout_s):
                yield {"seconds": {}, "span": (time.time(), time.time()), "output": output}

    def draft(self, outputs: pa.Table, counts: Mapping[str, Any]) -> Generation:
        """Return the generation to publish."""
        source = self.task.source
        queries = None if source.generation is None else dict(source.generation.fingerprint)
        return Generation(
            kind="run",
            fingerprint={**self.task.fingerprint, "queries": queries},
            config=asdict(self.config),
            counts=counts,
            files=listed_files(outputs),
            rejects=listed_rejects(outputs),
            plan=self._write_plan(outputs),
        )

    def _write_plan(self, outputs: pa.Table) -> dict[str, Any]:
        blocks = {block.key(self.task.run_fingerprint): block for block in self._blocks()}
        by_key = {row["unit_key"]: row for row in outputs.to_pylist()}
        rows = [{**by_key[key], "spans": block.to_json()} for key, block in blocks.items()]
        return store_plan(self.storage, pa.Table.from_pylist(rows, schema=UNITS))

    def _blocks(self) -> list[QueryBlock]:
        return list(self.task.source.plan_blocks())

    def estimate(self) -> dict[str, Any]:
        """Return what a search would do, for ``--dry-run``."""
        blocks = self._blocks()
        pool = self._pool(len(blocks))
        return {
            "queries": sum(block.stop - block.start for block in blocks),
            "blocks": len(blocks),
            "shards": len(self.shards),
            "groups": len(pool.groups),
            "actors": pool.num_actors,
            "actor_gib": round(pool.memory / 2**30, 3),
            "effort": self.task.options.effort,
        }


def total_counts(outputs: pa.Table) -> dict[str, Any]:
    """Add up the counts of all blocks.

    Raises:
        IntegrityError: A query was neither searched nor rejected.
    """
    totals: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for text in outputs["counts"]:
        counts = json.loads(text.as_py())
        rejected.update(counts.pop("rejected"))
        totals.update(counts)
    counts = {name: totals[name] for name in ("queries", "searched", "without_hits")}
    if counts["queries"] != counts["searched"] + sum(rejected.values()):
        raise IntegrityError(
            f"{counts['queries']} queries in, but {counts['searched']} searched and "
            f"{sum(rejected.values())} rejected; nothing was published. This is a bug: report it"
        )
    return {**counts, "rejected": dict(sorted(rejected.items()))}


def _check_complete(outputs: pa.Table, keys: Sequence[str]) -> None:
    missing = set(keys) - set(outputs["unit_key"].to_pylist())
    if missing or len(outputs) != len(keys):
        raise IntegrityError(
            f"{len(keys)} blocks were planned, {len(outputs)} are finished and {len(missing)} "
            "missing; nothing was published. This is a bug: report it with the log"
        )
