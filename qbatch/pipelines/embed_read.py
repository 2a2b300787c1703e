"""The first stage: read a unit, validate, split and tokenize it. Imports no torch."""

import functools
import time
from collections.abc import Sequence

import pyarrow as pa

from qbatch.corpus.passages import split_and_tokenize
from qbatch.corpus.reading import read_unit, reject_spans
from qbatch.corpus.spans import Span, Unit
from qbatch.models.hub import resolve_model
from qbatch.models.tokenization import TextTokenizer, TokenizerSpec
from qbatch.pipelines.embed_known import VanishedFiles, split_documents
from qbatch.pipelines.embed_task import EmbedTask, unit_row
from qbatch.pipelines.trial import Trial


def read_and_tokenize(
    batch: pa.Table, *, task: EmbedTask, vanished: VanishedFiles | None = None
) -> pa.Table:
    """Turn a planned unit into tokenized passages, passages that need no model, and rejects."""
    return _read(batch, _planned_unit(batch), [], task, vanished)


def read_carefully(
    batch: pa.Table, trial: Trial, *, task: EmbedTask, vanished: VanishedFiles | None = None
) -> pa.Table:
    """Do the same without the spans that kill the process; they are rejected as objects are."""
    spans = _planned_unit(batch).spans

    def probe(rows: list[int]) -> None:
        unit = Unit(tuple(spans[row] for row in rows))
        tokenize(read_unit(unit, task.corpus).documents, task)

    killers = trial.killers(([row] for row in range(len(spans))), probe)
    left = Unit(tuple(span for row, span in enumerate(spans) if row not in killers))
    return _read(batch, left, [spans[row] for row in killers], task, vanished)


def _planned_unit(batch: pa.Table) -> Unit:
    return Unit.from_json(batch["spans"][0].as_py())


def _read(
    batch: pa.Table,
    unit: Unit,
    killers: Sequence[Span],
    task: EmbedTask,
    vanished: VanishedFiles | None,
) -> pa.Table:
    started = time.perf_counter()
    rows = reject_spans(read_unit(unit, task.corpus), killers, task.corpus)
    split = split_documents(rows.documents, unit, vanished)
    read_s = time.perf_counter() - started
    passages = tokenize(split.fresh, task)
    tokenize_s = time.perf_counter() - started - read_s
    stats = {
        "rows_in": rows.rows_in,
        "notes": dict(rows.counts),
        "seconds": {"read": read_s, "tokenize": tokenize_s},
    }
    return unit_row(
        batch["unit_key"][0].as_py(),
        stats,
        passages=passages,
        rejects=rows.rejects,
        reused=split.reused,
        places=split.places(passages),
    )


def tokenize(documents: pa.Table, task: EmbedTask) -> pa.Table:
    """Split and tokenize validated documents: schema.PASSAGES and the kept columns."""
    return split_and_tokenize(
        documents,
        _tokenizer(task.model, task.revision, task.tokenizer, task.max_tokens),
        max_tokens=task.max_tokens,
        overlap_tokens=task.overlap_tokens,
        prompt=task.prompt,
    )


@functools.lru_cache(maxsize=1)
def _tokenizer(
    model: str, revision: str | None, spec: TokenizerSpec, max_tokens: int
) -> TextTokenizer:
    return TextTokenizer.load(resolve_model(model, revision), max_tokens, spec)
