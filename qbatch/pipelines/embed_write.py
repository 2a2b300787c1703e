"""The last stage: check a unit's vectors and rows, write rejects and file. Imports no torch."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch.corpus.reasons import KILLED_PROCESS, NON_FINITE_VECTOR
from qbatch.errors import BadInputError, IntegrityError
from qbatch.models.vectors import quantize, truncate_normalise
from qbatch.pipelines.conservation import check_balance
from qbatch.pipelines.embed_task import EmbedTask, unit_table
from qbatch.pipelines.unit_files import write_rejects, write_unit_file
from qbatch.schema import PASSAGES, REJECTS, vector_array, vector_matrix, vectors_schema
from qbatch.storage import Storage

_NORM_TOLERANCE = 1e-3


def write_unit(batch: pa.Table, *, task: EmbedTask) -> pa.Table:
    """Write one unit's rejects, then its vectors file; return its row of OUTPUTS as JSON."""
    started = time.perf_counter()
    unit_key = batch["unit_key"][0].as_py()
    stats = json.loads(batch["stats"][0].as_py())
    passages, rejects = unit_table(batch, "passages"), unit_table(batch, "rejects")
    matrix = vector_matrix(unit_table(batch, "vectors")["vector"])
    is_good, rejects, rejected = _reject_non_finite(
        passages, matrix, stats["killers"], rejects, task
    )
    passages, matrix = passages.filter(pa.array(is_good)), matrix[is_good]
    if task.normalize:
        _check_norms(matrix, unit_key)
    reused = unit_table(batch, "reused")
    is_kept = np.concatenate([is_good, np.ones(len(reused), bool)])
    places = unit_table(batch, "places")["place"].to_numpy()[is_kept]
    table = _in_document_order(vectors_table(passages, matrix, task), reused, places)
    counts = unit_counts(table, Counter(stats["notes"]) + rejected, stats["rows_in"])
    counts["passages_reused"] = len(reused)
    storage = Storage(task.output)
    record = {
        "unit_key": unit_key,
        "fingerprint": task.fingerprint,
        "counts": counts,
        "rejects": write_rejects(storage, unit_key, rejects),
    }
    output = write_unit_file(storage, record, table)
    stats["seconds"]["write"] = time.perf_counter() - started
    return pa.table({"output": [json.dumps(output)], "stats": [json.dumps(stats)]})


def _reject_non_finite(
    passages: pa.Table,
    matrix: np.ndarray,
    killers: Sequence[int],
    rejects: pa.Table,
    task: EmbedTask,
) -> tuple[np.ndarray, pa.Table, Counter[str]]:
    """Return which passages to keep, and the rejects with the documents of all others.

    A document with one passage that is not finite goes as a whole.

    Args:
        passages: Of the unit.
        matrix: Their vectors.
        killers: Passages that were not computed, since they kill the process.
        rejects: schema.REJECTS so far.
        task: Of the job.
    """
    finite = np.isfinite(matrix).all(axis=1)
    if finite.all():
        return finite, rejects, Counter()
    reasons = np.full(len(matrix), NON_FINITE_VECTOR, object)
    reasons[np.asarray(killers, np.int64)] = KILLED_PROCESS
    bad = passages.select(["object_uri", "row", "doc_id"]).append_column(
        "reason", pa.array(reasons, pa.string())
    )
    bad = bad.filter(pa.array(~finite)).group_by(bad.column_names[:3], use_threads=False)
    bad = bad.aggregate([("reason", "min")]).rename_columns({"reason_min": "reason"})
    if task.corpus.on_bad_row == "fail":
        first = bad.slice(0, 1).to_pylist()[0]
        raise BadInputError(
            f"the model cannot embed row {first['row']} of {first['object_uri']}: "
            f"{first['reason']}. Compute in --dtype bfloat16 or float32, or allow it with "
            "--on-bad-row quarantine"
        )
    keys = zip(passages["object_uri"].to_pylist(), passages["row"].to_pylist(), strict=True)
    lost = set(zip(bad["object_uri"].to_pylist(), bad["row"].to_pylist(), strict=True))
    keep = np.fromiter((key not in lost for key in keys), bool, len(passages))
    if task.corpus.on_bad_row == "quarantine":
        rejects = pa.concat_tables([rejects, _conform(bad, REJECTS)])
    return keep, rejects, Counter(f"rejected:{reason}" for reason in bad["reason"].to_pylist())


def _in_document_order(made: pa.Table, reused: pa.Table, places: np.ndarray) -> pa.Table:
    """Return made and reused rows as one table.

    Args:
        made: schema.vectors_schema.
        reused: The same, or a table without columns.
        places: Of the document of each row, made ones first.
    """
    if not reused.num_columns:
        return made
    known = reused.select(made.column_names).cast(made.schema)
    joined = pa.concat_tables([made, known]).unify_dictionaries()
    return joined.take(pa.array(np.argsort(places, kind="stable"))).combine_chunks()


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def _check_norms(matrix: np.ndarray, unit_key: str) -> None:
    norms = np.linalg.norm(matrix, axis=1)
    wrong = np.flatnonzero(np.abs(norms - 1) > _NORM_TOLERANCE)
    if len(wrong):
        raise IntegrityError(
            f"{len(wrong)} vectors of unit {unit_key} are not of length 1, the first "
            f"{norms[wrong[0]]:g}: the model or its self-check is broken; nothing was written"
        )


def unit_counts(passages: pa.Table, notes: Mapping[str, int], rows_in: int) -> dict[str, Any]:
    """Return what a unit's rows became, after checking that none is missing.

    Raises:
        IntegrityError: rows in differ from rows embedded plus rows rejected.
    """
    rejected = {
        k.removeprefix("rejected:"): v for k, v in notes.items() if k.startswith("rejected:")
    }
    # Passages of one document lie side by side, so that index 0 stands for the document.
    embedded = pc.sum(pc.equal(passages["passage_index"], 0)).as_py() or 0
    counts = {
        "rows_in": rows_in,
        "rows_embedded": embedded,
        "passages": passages.num_rows,
        "tokens": pc.sum(passages["num_tokens"]).as_py() or 0,
        "rejected": dict(sorted(rejected.items())),
        "notes": {k: v for k, v in sorted(notes.items()) if not k.startswith("rejected:")},
    }
    check_balance(counts, "rows", rows_out="rows_embedded")
    return counts


def vectors_table(passages: pa.Table, matrix: np.ndarray, task: EmbedTask) -> pa.Table:
    """Join passages with their vectors in every asked width and dtype: schema.vectors_schema."""
    num_fields = len(PASSAGES) - 1  # without token_ids
    columns = passages.columns[:num_fields]
    for i, dim in enumerate(task.dims):
        width = truncate_normalise(matrix, dim) if task.normalize else matrix[:, :dim]
        if task.vector_dtype == "int8":
            width = quantize(width, task.scales[i])
        columns.append(
            pa.chunked_array([vector_array(width.astype(task.vector_dtype, copy=False))])
        )
    kept = [passages.schema.field(i) for i in range(num_fields, passages.num_columns)]
    schema = vectors_schema(task.dims, task.vector_dtype, kept)
    return pa.table([*columns, *passages.columns[num_fields:]], schema=schema)
