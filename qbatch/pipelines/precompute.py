"""The precompute job: everything a search box or a "related items" row will show, as one table.

queries or documents -> run -> candidates -> reranked -> recommendations, each step a published
table below ``--output``, so that a killed job goes on where it stopped and every step can be looked
at.
"""

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qbatch.corpus.config import Format
from qbatch.errors import ConfigError
from qbatch.index.filters import filter_columns
from qbatch.index.selecting import SelectionOptions
from qbatch.pipelines.cluster import ray_session
from qbatch.pipelines.precompute_candidates import CandidatesTask, make_candidates
from qbatch.pipelines.precompute_slices import SliceTask
from qbatch.pipelines.precompute_table import current_recommendations, publish_recommendations
from qbatch.pipelines.rerank import RerankCandidatesConfig, rerank_candidates
from qbatch.pipelines.search_index import (
    SearchIndexConfig,
    open_index_table,
    query_source,
    search_index,
)
from qbatch.report.writing import write_report
from qbatch.storage import Storage, probe
from qbatch.tables import PublishedTable, open_table

log = logging.getLogger(__name__)

Mode = Literal["queries", "items"]

_CANDIDATES_PER_ITEM = 5
"""Default depth of the search: what is left out must not leave lists short."""

_MAX_PARTITIONS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputeConfig:
    """Precompute search results, or each document's related documents."""

    index: str
    """Directory of the index."""
    index_generation: int | None = None
    """Which generation of the index is searched; None is the newest."""
    output: str
    """Directory of the recommendations; the steps before lie in run/, candidates/ and reranked/
    below it."""
    mode: Mode = "queries"
    """queries: a log is searched. items: every document asks, and does not find itself."""
    queries: str | None = None
    """Texts, Parquet with vectors, or a vectors table; items asks with the index's documents."""
    top_k: int = 10
    """Items a key."""
    candidates_k: int | None = None
    """Documents found before any are left out; None is 5 times top_k, or rerank_k."""
    nprobe: int | None = None
    """Inverted lists visited (ef_search of a graph); None is what the build found necessary."""
    rescore: int = 0
    """Exact scores from the stored vectors for this many times candidates_k of each shard."""
    filter: str | None = None
    """What may be found, over kept columns, such as: lang == "en" and year >= 2020."""
    tombstones: str | None = None
    """Parquet files whose doc_id column names documents that must not be found any more."""
    max_similarity: float | None = None
    """Items scored above it are near-duplicates and left out; a lossy index needs --rescore."""
    same: str | None = None
    """Kept column in which related documents agree, such as a category."""
    diversity: float = 0.0
    """From 0, best first, to 1, unlike each other (maximal marginal relevance, 1 - lambda)."""
    id_column: str = "query_id"
    """Column of the query's id, which becomes the key."""
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
    reranker: str | None = None
    """Directory or hub id of a reranker that puts the items in order; None keeps the search's."""
    reranker_revision: str | None = None
    """Commit of the reranker's hub id."""
    rerank_k: int = 50
    """Documents of a key that the reranker reads."""
    rerank_instruction: str | None = None
    """Task sentence for the reranker; None is the model card's."""
    rerank_max_tokens: int | None = None
    """Longest pair, prompt included, beyond which documents are cut; None is the model's limit."""
    corpus: str | None = None
    """Texts of the documents, in any corpus format, which the reranker reads."""
    corpus_format: Format = "auto"
    """How to read --corpus."""
    corpus_id_column: str = "doc_id"
    """Column of the document's id in --corpus."""
    corpus_text_column: str = "text"
    """Column of the document's text in --corpus."""
    corpus_title_column: str | None = None
    """Column of a title that goes before the text; None for none."""
    num_partitions: int = 64
    """Files of the table, keys shared out by hash; stays for the life of the table."""
    stall_timeout_s: float = 1800.0
    """Seconds without any progress after which the job ends with code 6."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""
    dry_run: bool = False
    """Print the plan; compute nothing."""

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_mode(self)
        _check_reranker(self)

    @property
    def selection(self) -> SelectionOptions:
        """What becomes of the documents found."""
        return SelectionOptions(
            top_k=self.num_selected,
            are_items=self.mode == "items",
            max_similarity=self.max_similarity,
            same=self.same,
            diversity=self.diversity,
        )

    @property
    def num_selected(self) -> int:
        """Documents of each key that are left for the last step before the table."""
        return self.top_k if self.reranker is None else self.rerank_k

    @property
    def selects(self) -> bool:
        """Some of the documents found are left out or change places."""
        return self.mode == "items" or self.diversity > 0

    @property
    def depth(self) -> int:
        """Documents the search finds for each key."""
        if not self.selects:
            return self.num_selected
        return self.candidates_k or _CANDIDATES_PER_ITEM * self.num_selected


def _check_ranges(config: PrecomputeConfig) -> None:
    for name in ("top_k", "nprobe", "num_partitions", "rerank_k"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; give 1 or more")
    if config.num_partitions > _MAX_PARTITIONS:
        raise ConfigError(
            f"num_partitions is {config.num_partitions}; give {_MAX_PARTITIONS} or fewer, a file "
            "should hold thousands of keys"
        )
    if config.candidates_k is not None and config.candidates_k < config.num_selected:
        name = "top_k" if config.reranker is None else "rerank_k"
        raise ConfigError(
            f"candidates_k is {config.candidates_k}, less than {name}={config.num_selected}; give "
            "more candidates than are left of them"
        )
    if not 0 <= config.diversity <= 1:
        raise ConfigError(f"diversity is {config.diversity}; give 0 (off) to 1")
    if config.max_similarity is not None and not -1 <= config.max_similarity <= 1:
        raise ConfigError(f"max_similarity is {config.max_similarity}; give a cosine, -1 to 1")
    if config.filter is not None:
        filter_columns(config.filter)


def _check_mode(config: PrecomputeConfig) -> None:
    if config.mode == "items" and config.queries is not None:
        raise ConfigError(
            f"queries is {config.queries!r} with --mode=items, where the documents of the index "
            "ask; leave it out, or give --mode=queries"
        )
    if config.mode == "items":
        return
    if config.queries is None:
        raise ConfigError("--mode=queries needs --queries: texts, vectors or a vectors table")
    for name in ("max_similarity", "same"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r} with --mode=queries: it compares items with "
                "the item that asks; give --mode=items, or --diversity against results that "
                "repeat each other"
            )


def _check_reranker(config: PrecomputeConfig) -> None:
    if config.reranker is None:
        if config.corpus is not None:
            raise ConfigError(
                f"corpus is {config.corpus!r} without --reranker, which alone reads it; give both "
                "or neither"
            )
        return
    if config.corpus is None:
        raise ConfigError(
            f"reranker is {config.reranker!r} without --corpus; give the texts of the documents"
        )
    if config.rerank_k < config.top_k:
        raise ConfigError(
            f"rerank_k is {config.rerank_k}, less than top_k={config.top_k}; rerank at least what "
            "is kept"
        )
    if config.mode == "queries" and config.vector_column is not None:
        raise ConfigError(
            f"vector_column is {config.vector_column!r} with --reranker, which reads the texts of "
            "queries; leave one of them out"
        )


def precompute(config: PrecomputeConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    index = open_index_table(config.index, config.index_generation)
    _check_index(config, index)
    storage = Storage(config.output, single_writer=config.single_writer)
    current_recommendations(storage, config.num_partitions)
    search = search_config(config, index)
    if config.dry_run:
        return {
            "search": search_index(search),
            "num_partitions": config.num_partitions,
            "steps": _steps(config),
        }
    probe(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s):
        searched = search_index(search)
        searched_at = time.perf_counter()
        run = open_table(search.output, searched["generation"])
        candidates = _candidates(config, index, run)
        selected_at = time.perf_counter()
        ranked = _reranked(config, candidates)
        reranked_at = time.perf_counter()
        task = SliceTask(
            output=config.output,
            run=ranked,
            source=query_source(search, index.generation),
            num_searched=run.generation.counts["searched"],
            num_partitions=config.num_partitions,
            top_k=config.top_k,
        )
        published = publish_recommendations(
            task,
            asdict(config),
            stall_timeout_s=config.stall_timeout_s,
            single_writer=config.single_writer,
        )
    done_at = time.perf_counter()
    summary = {
        **published,
        "rejected": searched["rejected"],
        "seconds": {
            "search": round(searched_at - started, 3),
            "candidates": round(selected_at - searched_at, 3),
            "rerank": round(reranked_at - selected_at, 3),
            "recommendations": round(done_at - reranked_at, 3),
            "total": round(done_at - started, 3),
        },
    }
    write_report(storage, "recommendations", summary)
    return summary


def _steps(config: PrecomputeConfig) -> list[str]:
    steps = {"candidates": config.selects, "reranked": config.reranker is not None}
    return ["run", *(name for name, is_made in steps.items() if is_made), "recommendations"]


def _check_index(config: PrecomputeConfig, index: PublishedTable) -> None:
    generation = index.generation
    kept = generation.details["columns"]
    if config.same is not None and config.same not in kept:
        raise ConfigError(
            f"same is {config.same!r}, the index keeps {kept}; keep the column with "
            "--keep-columns when embedding, and build the index again"
        )
    if config.max_similarity is not None and not generation.fingerprint["embedding"]["normalize"]:
        raise ConfigError(
            f"max_similarity is {config.max_similarity}, but scores of this index are no cosines: "
            "its model gives vectors of any length. Leave it out"
        )


def search_config(config: PrecomputeConfig, index: PublishedTable) -> SearchIndexConfig:
    """Return the search that finds the candidates of every key."""
    vectors = index.generation.details["vectors"]
    are_items = config.mode == "items"
    names = ("id_column", "text_column", "vector_column", "format", "instruction", "model")
    more = ("revision", "nprobe", "rescore", "filter", "tombstones", "stall_timeout_s")
    return SearchIndexConfig(
        index=config.index,
        index_generation=index.generation.number,
        queries=vectors["uri"] if are_items else config.queries or "",
        queries_generation=vectors["generation"] if are_items else None,
        output=f"{config.output.rstrip('/')}/run",
        top_k=config.depth,
        exclude_self=are_items,
        locate=config.selects,
        single_writer=config.single_writer,
        dry_run=config.dry_run,
        **{name: getattr(config, name) for name in (*names, *more)},
    )


def _candidates(
    config: PrecomputeConfig, index: PublishedTable, run: PublishedTable
) -> PublishedTable:
    """Return the run whose first rows become the items."""
    if not config.selects:
        return run
    output = f"{config.output.rstrip('/')}/candidates"
    published = make_candidates(
        CandidatesTask.of(run, index, config.selection, output),
        asdict(config),
        stall_timeout_s=config.stall_timeout_s,
        single_writer=config.single_writer,
    )
    return open_table(output, published.number)


def _reranked(config: PrecomputeConfig, candidates: PublishedTable) -> PublishedTable:
    """Return the candidates in the reranker's order, when there is one."""
    if config.reranker is None:
        return candidates
    reranking = reranking_config(config, candidates)
    reranked = rerank_candidates(reranking)
    return open_table(reranking.output, reranked["generation"])


def reranking_config(config: PrecomputeConfig, run: PublishedTable) -> RerankCandidatesConfig:
    """Return the reranking of a run; in items the text of the document that asks is the query."""
    are_items = config.mode == "items"
    return RerankCandidatesConfig(
        run=run.storage.uri,
        run_generation=run.generation.number,
        queries=config.corpus if are_items else config.queries,
        corpus=config.corpus,
        output=f"{config.output.rstrip('/')}/reranked",
        model=config.reranker or "",
        revision=config.reranker_revision,
        instruction=config.rerank_instruction,
        max_tokens=config.rerank_max_tokens,
        top_k=config.top_k,
        query_id_column=config.corpus_id_column if are_items else config.id_column,
        query_text_column=config.corpus_text_column if are_items else config.text_column,
        queries_format=config.corpus_format if are_items else config.format,
        doc_id_column=config.corpus_id_column,
        text_column=config.corpus_text_column,
        title_column=config.corpus_title_column,
        format=config.corpus_format,
        stall_timeout_s=config.stall_timeout_s,
        single_writer=config.single_writer,
    )
