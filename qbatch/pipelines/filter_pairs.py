"""The filter job: pairs become fewer and better ones, published.

embed both sides of every pair on a pool of actors, a file of cosines a unit -> threshold and leak
check -> duplicates over all units -> write one file a unit -> check that every pair is accounted
for -> publish. Killed anywhere, it goes on where it stopped.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from qbatch.cli import StrList
from qbatch.corpus.config import Format
from qbatch.corpus.spans import Unit
from qbatch.errors import ConfigError
from qbatch.manifest import Generation, fingerprint_id, latest_generation, publish_change
from qbatch.models.hub import resolve_model
from qbatch.models.loading import ModelSpec, load_spec
from qbatch.pipelines.cluster import MAX_RETRIES, ray_session
from qbatch.pipelines.compute_dtype import compute_dtype
from qbatch.pipelines.embed import EmbedCorpusConfig, embedding_fingerprint, make_task
from qbatch.pipelines.embed_resume import Plan, draft_of_units
from qbatch.pipelines.evaluation_queries import LeakCheck, read_evaluation_queries
from qbatch.pipelines.finished_units import finished_units
from qbatch.pipelines.pair_decisions import (
    KEPT,
    REASONS,
    PairRules,
    ScoredUnit,
    describe,
    find_duplicates,
    judge_units,
    with_duplicates,
)
from qbatch.pipelines.pair_scoring import (
    PairPrompts,
    ScoringTask,
    cosines,
    score_units,
    scoring_fingerprint,
)
from qbatch.pipelines.pair_source import (
    PAIRS_IDENTITY,
    pair_source,
    read_pairs,
    reject_pairs,
    unit_counts,
)
from qbatch.pipelines.tasks import results_as_completed
from qbatch.pipelines.unit_files import (
    OUTPUTS,
    list_partials,
    read_partial,
    write_partial,
    write_rejects,
    write_unit_file,
)
from qbatch.pipelines.unit_job import UnitJobConfig
from qbatch.report.rerank_progress import RerankProgress
from qbatch.report.writing import write_report
from qbatch.schema import SCHEMA_VERSION, TRAINING_PAIRS, ComputeDtype
from qbatch.storage import Storage, probe

log = logging.getLogger(__name__)

_UNITS_PER_TASK = 16
_KEYS_PER_PART = 2**25
"""About a gigabyte while duplicates are sought among them."""

_BIN = 0.05
"""Width of a bar of the histogram."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterPairsConfig(UnitJobConfig):
    """Keep the training pairs whose query and document belong together, each once."""

    pairs: str
    """Published pairs table, or Parquet, JSON lines or CSV with the columns query and document."""
    output: str
    """Directory of the filtered pairs table."""
    model: str
    """Embedder that gives the cosines: directory or hub id."""
    revision: str | None = None
    """Commit of a hub id; None is the pinned one of a known model."""
    instruction: str | None = None
    """Task sentence of queries whose pair names none; None is the model's own."""
    format: Format = "auto"
    """How to read files; auto goes by names."""
    keep_columns: StrList = ()
    """Further columns to carry to the output."""
    min_cosine: float = 0.7
    """A pair stays if its cosine is strictly above; the report of Qwen3 Embedding has 0.7."""
    quantile: float | None = None
    """Instead of --min-cosine: pairs strictly above this quantile of all cosines stay."""
    near_duplicates: bool = True
    """Drop near-duplicates of earlier pairs as well as exact ones."""
    evaluation: StrList = ()
    """Evaluation sets (BEIR folders, or queries in any corpus format): pairs that ask one of their
    queries, or nearly, are dropped."""
    evaluation_text_column: str = "text"
    """Column of the evaluation's queries."""
    max_tokens: int | None = None
    """Tokens of a text that are looked at, prompt included; None is the model's own limit."""
    dim: int | None = None
    """Leading components of the vectors (Matryoshka); None is all."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Compute dtype; auto is bfloat16 where the processor has it, else float32."""
    token_budget: int | None = None
    """Tokens in one forward pass; None suits the device."""
    unit_bytes: int = 16 * 2**20
    """Aimed size of a unit of work in bytes of input."""
    dry_run: bool = False
    """Print the plan; start nothing."""

    def __post_init__(self) -> None:
        UnitJobConfig.__post_init__(self)
        if not -1 <= self.min_cosine <= 1:
            raise ConfigError(f"min_cosine is {self.min_cosine}; give -1 to 1")
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ConfigError(f"quantile is {self.quantile}; give 0 to below 1")

    def scoring(self, spec: ModelSpec, dtype: ComputeDtype) -> tuple[ScoringTask, dict[str, Any]]:
        """Return what scoring processes need, and the fingerprint of the cosines."""
        embed = EmbedCorpusConfig(
            input=self.pairs,
            output=self.output,
            model=self.model,
            revision=self.revision,
            max_tokens=self.max_tokens,
            dims=() if self.dim is None else (self.dim,),
            token_budget=self.token_budget,
        )
        source = pair_source(
            self.pairs,
            file_format=self.format,
            keep_columns=self.keep_columns,
            unit_bytes=self.unit_bytes,
        )
        task = ScoringTask(
            source=source,
            embed=make_task(embed, spec, dtype),
            prompts=PairPrompts.of(spec, self.instruction),
        )
        return task, scoring_fingerprint(task, embedding_fingerprint(task.embed, spec))


@dataclass(frozen=True, kw_only=True, slots=True)
class FilteredUnit:
    """A unit of pairs and what was decided about them."""

    unit: Unit
    decisions: str
    """Hash of the codes of its pairs."""

    def key(self, fingerprint: str) -> str:
        """Return the name of this unit's output under a fingerprint."""
        own = {"unit": self.unit.key(fingerprint), "decisions": self.decisions}
        return fingerprint_id(own)

    def to_json(self) -> str:
        """Return the unit for a plan."""
        return self.unit.to_json()


def filter_pairs(config: FilterPairsConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    spec = load_spec(resolve_model(config.model, config.revision))
    if config.dry_run:
        units = list(config.scoring(spec, "float32")[0].source.plan_units())
        return {"dry_run": True, "units": len(units)}
    leaks = LeakCheck(read_evaluation_queries(config.evaluation, config.evaluation_text_column))
    storage = Storage(config.output, single_writer=config.single_writer)
    probe(storage)
    current = latest_generation(storage)
    with ray_session(stall_timeout_s=config.stall_timeout_s):
        job = _Filter.start(config, spec, storage, leaks)
        scored, num_made = job.score()
        scored_at = time.perf_counter()
        values = job.read_cosines(scored)
        rules = job.rules(values)
        codes = job.decide(scored, rules)
        outputs, plan = job.write(scored, codes, rules, current)
    counts = total_counts(outputs)
    config.check_counts(counts, "pairs")
    draft = draft_of_units(
        storage,
        plan,
        outputs,
        kind="pairs",
        fingerprint={**job.settings, "threshold": rules.threshold},
        config=asdict(config),
        counts=counts,
    )
    published = publish_change(storage, draft, current)
    summary = {
        "generation": published.number,
        **counts,
        "threshold": round(rules.threshold, 6),
        "evaluation_queries": leaks.num_queries,
        "cosines": cosine_histogram(values),
        "units": len(plan),
        "units_scored": num_made,
        "seconds": {
            "score": round(scored_at - started, 3),
            "total": round(time.perf_counter() - started, 3),
        },
    }
    write_report(storage, "pairs", summary)
    return summary


def cosine_histogram(values: np.ndarray) -> dict[str, int]:
    """Count pairs by cosine, in bars from the named value up to the next; none is empty."""
    bars = np.floor(values[np.isfinite(values)].astype(np.float64) / _BIN + 1e-6).astype(int)
    return {f"{bar * _BIN:.2f}": n for bar, n in sorted(Counter(bars.tolist()).items())}


def total_counts(outputs: pa.Table) -> dict[str, Any]:
    """Add up the counts of all units."""
    totals: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for text in outputs["counts"]:
        counts = json.loads(text.as_py())
        rejected.update(counts.pop("rejected"))
        totals.update(counts)
    return {
        "rows_in": totals["rows_in"],
        "rows_out": totals["rows_out"],
        "rejected": dict(sorted(rejected.items())),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Filter:
    """What the steps of one job share."""

    config: FilterPairsConfig
    storage: Storage
    task: ScoringTask
    leaks: LeakCheck
    settings: dict[str, Any]
    """Fingerprint of everything but the threshold."""
    scoring_id: str
    pool: Any

    @classmethod
    def start(
        cls, config: FilterPairsConfig, spec: ModelSpec, storage: Storage, leaks: LeakCheck
    ) -> "_Filter":
        pool = config.pool()
        task, scoring = config.scoring(spec, compute_dtype(config.dtype, pool.gpus_per_actor))
        settings = {
            "schema_version": SCHEMA_VERSION,
            "scoring": scoring,
            "near_duplicates": config.near_duplicates,
            "evaluation": leaks.fingerprint(),
        }
        return cls(
            config=config,
            storage=storage,
            task=task,
            leaks=leaks,
            settings=settings,
            scoring_id=fingerprint_id(scoring),
            pool=pool,
        )

    def score(self) -> tuple[list[ScoredUnit], int]:
        """Make the cosines that are missing; return all units, and how many were made."""
        units = {unit.key(self.scoring_id): unit for unit in self.task.source.plan_units()}
        partials = list_partials(self.storage)
        pending = [(key, unit) for key, unit in units.items() if key not in partials]
        log.info("%d units planned, %d to be embedded", len(units), len(pending))
        progress = RerankProgress(len(pending))
        write = partial(_write_cosines, self.storage)
        for stats, _ in score_units(pending, self.task, self.pool, write):
            progress.add(stats, stats)
        partials = list_partials(self.storage)
        scored = [
            ScoredUnit(number=number, unit=unit, partial=partials[key])
            for number, (key, unit) in enumerate(units.items())
        ]
        return scored, len(pending)

    def _groups(self, scored: Sequence[ScoredUnit]) -> list[list[ScoredUnit]]:
        return [
            list(scored[i : i + _UNITS_PER_TASK]) for i in range(0, len(scored), _UNITS_PER_TASK)
        ]

    def read_cosines(self, scored: Sequence[ScoredUnit]) -> np.ndarray:
        """Return the cosines of all pairs, float32: four bytes a pair in this process."""
        read = ray.remote(max_retries=MAX_RETRIES)(_read_cosines)
        refs = [read.remote(self.storage, group) for group in self._groups(scored)]
        return np.concatenate([np.empty(0, np.float32), *ray.get(refs)])

    def rules(self, values: np.ndarray) -> PairRules:
        """Return the rules with their threshold."""
        threshold, finite = self.config.min_cosine, values[np.isfinite(values)]
        if self.config.quantile is not None and len(finite):
            threshold = float(np.quantile(finite.astype(np.float64), self.config.quantile))
        return PairRules(
            output=self.config.output,
            source=self.task.source,
            threshold=threshold,
            near_duplicates=self.config.near_duplicates,
            fingerprint=fingerprint_id({**self.settings, "threshold": threshold}),
        )

    def decide(self, scored: Sequence[ScoredUnit], rules: PairRules) -> list[np.ndarray]:
        """Return the codes of each unit's pairs."""
        num_parts = max(1, self._num_keys(scored) // _KEYS_PER_PART)
        judge: Any = ray.remote(max_retries=MAX_RETRIES, num_returns=1 + num_parts)(judge_units)
        find = ray.remote(max_retries=MAX_RETRIES)(find_duplicates)
        shared = ray.put(rules), ray.put(self.leaks)
        judged = [judge.remote(group, *shared, num_parts) for group in self._groups(scored)]
        found = [find.remote(*(parts[1 + part] for parts in judged)) for part in range(num_parts)]
        codes = [own for parts in judged for own in ray.get(parts[0])]
        nothing = np.empty(0, np.int64)
        exact, near = [nothing], [nothing]
        for pair in results_as_completed(found, stall_timeout_s=self.config.stall_timeout_s):
            exact.append(pair[0])
            near.append(pair[1])
        return with_duplicates(codes, np.concatenate(exact), np.concatenate(near))

    def _num_keys(self, scored: Sequence[ScoredUnit]) -> int:
        # A pair has at least some hundred bytes and fifteen keys; units have a known size.
        num_bytes = sum(span.size for one in scored for span in one.unit.spans)
        return num_bytes // 100 * 15

    def write(
        self,
        scored: Sequence[ScoredUnit],
        codes: Sequence[np.ndarray],
        rules: PairRules,
        current: Generation | None,
    ) -> tuple[pa.Table, Plan]:
        """Write the units that are missing; return OUTPUTS of all, and the plan."""
        filtered = [
            FilteredUnit(unit=one.unit, decisions=hashlib.sha256(own.tobytes()).hexdigest()[:32])
            for one, own in zip(scored, codes, strict=True)
        ]
        plan = Plan(filtered, rules.fingerprint)
        done = finished_units(self.storage, plan.keys, current)
        known = set(done["unit_key"].to_pylist())
        write = ray.remote(max_retries=MAX_RETRIES)(write_filtered)
        shared = ray.put(rules)
        refs = [
            write.remote(self.storage, key, one, own, shared)
            for key, one, own in zip(plan.keys.to_pylist(), scored, codes, strict=True)
            if key not in known
        ]
        made = list(results_as_completed(refs, stall_timeout_s=self.config.stall_timeout_s))
        return pa.concat_tables([done, pa.Table.from_pylist(made, schema=OUTPUTS)]), plan


def _write_cosines(
    storage: Storage, key: str, unit: Unit, queries: np.ndarray, documents: np.ndarray
) -> str:
    del unit
    write_partial(storage, key, pa.table({"cosine": cosines(queries, documents)}))
    return key


def _read_cosines(storage: Storage, units: Sequence[ScoredUnit]) -> np.ndarray:
    found = [read_partial(storage, one.partial)["cosine"].to_numpy() for one in units]
    return np.concatenate([np.empty(0, np.float32), *found])


def write_filtered(
    storage: Storage, unit_key: str, scored: ScoredUnit, codes: np.ndarray, rules: PairRules
) -> dict[str, Any]:
    """Write one unit's rejects, then the pairs that stay; return its row of OUTPUTS."""
    rows = read_pairs(scored.unit, rules.source)
    values = read_partial(storage, scored.partial)["cosine"].to_numpy()
    score = rows.pairs.schema.get_field_index("score")
    pairs = rows.pairs.set_column(score, TRAINING_PAIRS.field("score"), pa.array(values))
    lost = np.flatnonzero(codes != KEPT)
    rejects = reject_pairs(
        pairs.take(pa.array(lost)),
        [str(REASONS[code]) for code in codes[lost]],
        [describe(codes[i], values[i], rules.threshold) for i in lost],
    )
    rejects = pa.concat_tables([rows.rejects, rejects])
    kept = pairs.filter(pa.array(codes == KEPT)).drop_columns([f.name for f in PAIRS_IDENTITY])
    further = list(kept.schema)[len(TRAINING_PAIRS) :]
    kept = kept.cast(pa.schema([*TRAINING_PAIRS, *further]))
    record = {
        "unit_key": unit_key,
        "fingerprint": rules.fingerprint,
        "counts": unit_counts(rows.rows_in, len(kept), rejects, "pairs"),
        "rejects": write_rejects(storage, unit_key, rejects),
    }
    return write_unit_file(storage, record, kept)
