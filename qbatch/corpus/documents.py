"""Judging raw rows: which become documents, and which are rejected and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbatch import schema
from qbatch.corpus import reasons
from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.rows import RAW_LIMIT, RawRows, Reject

_FIRST_PRINTABLE = 32
_TEXT_CONTROLS = np.frombuffer(b"\t\n\r", np.uint8)


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """The documents among some raw rows, and what became of the others."""

    documents: pa.Table
    rejects: list[Reject]
    """In row order; faults of the object as a whole come last."""
    counts: Counter[str]


def judge_rows(raw: RawRows, uri: str, config: CorpusConfig) -> JudgedRows:
    """Split raw rows of one object into documents and rejects, losing none.

    A text must be valid UTF-8 and not null, and with its title be more than whitespace. Longer
    texts are cut to ``max_document_bytes`` at a character; missing ids are generated. Controls and
    NUL stay.
    """
    texts, is_invalid = _decode(raw.texts)
    is_null = _mask(raw.texts.is_null())
    is_empty = _is_blank(texts) & _is_blank(raw.titles) & ~is_invalid & ~is_null
    rejects = [
        *raw.rejects,
        *_rejects(raw, is_invalid, reasons.INVALID_UTF8, "the text is not valid UTF-8"),
        *_rejects(raw, is_null, reasons.NULL_TEXT, f"{config.text_column!r} is null"),
        *_rejects(raw, is_empty, reasons.EMPTY_TEXT, "text and title are empty or only whitespace"),
    ]
    rejects.sort(key=lambda reject: (reject.row is None, reject.row or 0))
    batch = _batch(raw, texts, uri, config)
    is_good = ~(is_invalid | is_null | is_empty)
    if not is_good.all():
        batch = batch.filter(pa.array(is_good))
    counts = Counter(raw.counts)
    return JudgedRows(_finish(batch, config, counts), rejects, counts)


def _is_blank(strings: pa.Array) -> np.ndarray:
    strings = strings.cast(pa.large_string()).fill_null("")
    return _mask(pc.or_(pc.equal(pc.binary_length(strings), 0), pc.utf8_is_space(strings)))


def _decode(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return large_string with "" for null and for what is not UTF-8, and where the latter is."""
    is_invalid = np.zeros(len(texts), bool)
    empty = pa.scalar(b"", texts.type)
    texts = texts.fill_null(empty)  # kernels look at the bytes under a null
    try:
        return texts.cast(pa.large_string()), is_invalid
    except pa.ArrowInvalid:
        is_invalid[:] = [not _is_utf8(text) for text in texts]
        return pc.if_else(pa.array(is_invalid), empty, texts).cast(pa.large_string()), is_invalid


def _is_utf8(value: pa.Scalar) -> bool:
    try:
        str(value.as_buffer(), "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _mask(array: pa.Array) -> np.ndarray:
    mask: np.ndarray = array.fill_null(False).to_numpy(zero_copy_only=False)
    return mask


def _rejects(raw: RawRows, mask: np.ndarray, reason: str, detail: str) -> Iterator[Reject]:
    for i in np.flatnonzero(mask).tolist():
        text = raw.texts[i].as_buffer()
        yield Reject(
            row=raw.rows[i].as_py(),
            reason=reason,
            detail=detail,
            doc_id=raw.doc_ids[i].as_py(),
            raw=None if text is None else text[:RAW_LIMIT].to_pybytes(),
        )


def _batch(raw: RawRows, texts: pa.Array, uri: str, config: CorpusConfig) -> pa.RecordBatch:
    num_rows = len(texts)
    uris = pa.DictionaryArray.from_arrays(np.zeros(num_rows, np.int32), pa.array([uri]))
    kept = [raw.kept.get(name, pa.nulls(num_rows)) for name in config.keep_columns]
    return pa.record_batch(
        [uris, raw.rows, raw.doc_ids, raw.titles, texts, *kept],
        names=[*schema.DOCUMENTS.names, *config.keep_columns],
    )


def _finish(batch: pa.RecordBatch, config: CorpusConfig, counts: Counter[str]) -> pa.Table:
    """Fill the ids and cut the texts of rows that have been found good; count what changed."""
    doc_ids, num_generated = _filled_ids(batch)
    texts, num_cut = cut_texts(batch["text"], config.max_document_bytes)
    counts["generated_ids"] += num_generated
    counts["truncated_documents"] += num_cut
    counts["documents_with_controls"] += _num_with_controls(texts)
    uris, rows, _, titles, _, *kept = batch.columns
    kept_fields = list(batch.schema)[len(schema.DOCUMENTS) :]
    return pa.table(
        [uris, rows, doc_ids, titles, texts, *kept],
        schema=pa.schema([*schema.DOCUMENTS, *kept_fields]),
    )


def _filled_ids(batch: pa.RecordBatch) -> tuple[pa.Array, int]:
    """Return the ids, ``<object name>:<row>`` where there was none, and how many of these."""
    doc_ids = batch["doc_id"]
    is_missing = _mask(pc.equal(doc_ids.fill_null(""), ""))
    num_missing = int(is_missing.sum())
    if num_missing:
        missing = batch.filter(pa.array(is_missing))
        name = missing["object_uri"][0].as_py().rpartition("/")[2]
        rows = missing["row"].cast(pa.string())
        generated = pc.binary_join_element_wise(name, rows, ":").cast(pa.large_string())
        doc_ids = pc.replace_with_mask(doc_ids, pa.array(is_missing), generated)
    return doc_ids, num_missing


def cut_texts(texts: pa.Array, max_bytes: int) -> tuple[pa.Array, int]:
    """Return the texts of at most ``max_bytes`` of UTF-8, cut at a character, and how many were."""
    is_long = pc.greater(pc.binary_length(texts), max_bytes)
    long_texts = texts.filter(is_long)
    if not len(long_texts):
        return texts, 0
    heads = [text.as_buffer()[:max_bytes].to_pybytes() for text in long_texts]
    cut = pa.array([head.decode(errors="ignore") for head in heads], pa.large_string())
    return pc.replace_with_mask(texts, is_long, cut), len(cut)


def _num_with_controls(texts: pa.Array) -> int:
    """Count the texts that hold NUL or another control character."""
    _, offsets, data = texts.buffers()
    if not len(texts):
        return 0
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    low = np.flatnonzero(content < _FIRST_PRINTABLE)
    controls = low[~np.isin(content[low], _TEXT_CONTROLS)] + ends[0]
    return len(np.unique(np.searchsorted(ends, controls, side="right")))
