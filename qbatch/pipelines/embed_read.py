"""The first stage: read a unit, validate, split and tokenize it. Imports no torch."""

import functools
import time

import pyarrow as pa

from qbatch.corpus.passages import split_and_tokenize
from qbatch.corpus.reading import read_unit
from qbatch.corpus.spans import Unit
from qbatch.models.hub import resolve_model
from qbatch.models.tokenization import TextTokenizer, TokenizerSpec
from qbatch.pipelines.embed_known import VanishedFiles, split_documents
from qbatch.pipelines.embed_task import EmbedTask, unit_row


def read_and_tokenize(
    batch: pa.Table, *, task: EmbedTask, vanished: VanishedFiles | None = None
) -> pa.Table:
    """Turn a planned unit into tokenized passages, passages that need no model, and rejects."""
    unit_key = batch["unit_key"][0].as_py()
    unit = Unit.from_json(batch["spans"][0].as_py())
    started = time.perf_counter()
    rows = read_unit(unit, task.corpus)
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
        unit_key,
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
