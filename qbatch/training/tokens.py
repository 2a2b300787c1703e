"""Rows of the pairs table to token ids, with the prompts that the finished model will be given."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from qbatch.models.loading import ModelSpec
from qbatch.models.prompts import document_prompt, query_prompt, qwen3_query_prompt
from qbatch.models.rerank_tokens import CandidateGroup, CandidateTokens, PairTokenizer
from qbatch.models.tokenization import TextTokenizer
from qbatch.training.pairs import sample_negatives


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingTokens:
    """The texts of some rows, row by row: query, positive, hard negatives."""

    ids: np.ndarray
    """int32: the texts one after the other."""
    lengths: np.ndarray
    """int32, shape (texts,)."""
    places: np.ndarray
    """int64, shape (texts,): each text's place among rows * (2 + num_negatives)."""
    keys: np.ndarray
    """int64, shape (rows, 1 + num_negatives, 2): see ``losses.ContrastiveBatch``."""
    present: np.ndarray
    """bool, shape (rows, num_negatives)."""


class EmbeddingReader:
    """Puts prompts before texts and tokenizes them as the embed and search jobs do."""

    def __init__(self, spec: ModelSpec, tokenizer: TextTokenizer, instruction: str | None) -> None:
        """Take the model's prompts; ``instruction`` is that of queries whose row names none."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._instruction = instruction
        self._document_prompt = document_prompt(spec.prompts)
        self._query_prompt = lru_cache(maxsize=256)(self._make_query_prompt)

    def _make_query_prompt(self, instruction: str | None) -> str:
        return query_prompt(
            self._spec.prompts,
            architecture=self._spec.architecture,
            instruction=instruction or self._instruction,
        )

    def read(
        self, rows: pa.Table, numbers: np.ndarray, *, num_negatives: int, seed: Sequence[int]
    ) -> EmbeddingTokens:
        """Return the tokens of rows.

        Args:
            rows: TRAINING_PAIRS.
            numbers: Of each row in its table; the choice of its negatives depends on it.
            num_negatives: Most hard negatives of a row.
            seed: Of the epoch.
        """
        width = 2 + num_negatives
        texts: list[str] = []
        places: list[int] = []
        keys = np.zeros((len(rows), 1 + num_negatives, 2), np.int64)
        present = np.zeros((len(rows), num_negatives), bool)
        for i, (row, number) in enumerate(zip(rows.to_pylist(), numbers.tolist(), strict=True)):
            negatives, negative_ids = _negatives(row, num_negatives, [*seed, number])
            before = self._document_prompt
            if row["document_instruction"]:
                before = qwen3_query_prompt(row["document_instruction"])
            documents = [row["document"], *negatives]
            texts.append(self._query_prompt(row["instruction"]) + row["query"])
            texts += [before + document for document in documents]
            places += range(i * width, i * width + 1 + len(documents))
            keys[i, : len(documents)] = [
                document_keys(text, doc_id)
                for text, doc_id in zip(documents, [row["doc_id"], *negative_ids], strict=True)
            ]
            present[i, : len(negatives)] = True
        tokens = self._tokenizer.encode(texts)
        return EmbeddingTokens(
            ids=tokens.ids,
            lengths=tokens.lengths,
            places=np.array(places, np.int64),
            keys=keys,
            present=present,
        )


def read_candidates(
    rows: pa.Table,
    numbers: np.ndarray,
    tokenizer: PairTokenizer,
    *,
    num_negatives: int,
    seed: Sequence[int],
) -> list[CandidateTokens]:
    """Return the tokens of each row as a query and its candidates, the positive first.

    The arguments are those of ``EmbeddingReader.read``. A query that leaves no room for documents
    comes back without candidates, see ``CandidateTokens.reason``.
    """
    groups = []
    for row, number in zip(rows.to_pylist(), numbers.tolist(), strict=True):
        negatives, _ = _negatives(row, num_negatives, [*seed, number])
        documents = [row["document"], *negatives]
        groups.append(
            CandidateGroup(query=row["query"], documents=documents, instruction=row["instruction"])
        )
    return tokenizer.encode(groups)


def _negatives(
    row: dict[str, list[str] | None], num_wanted: int, seed: Sequence[int]
) -> tuple[list[str], list[str | None]]:
    negatives = row["negatives"] or []
    ids = row["negative_ids"]
    chosen = sample_negatives(len(negatives), num_wanted, seed)
    return [negatives[i] for i in chosen], [ids[i] if ids else None for i in chosen]


def document_keys(text: str, doc_id: str | None) -> tuple[int, int]:
    """Return the keys of a document's text and id; without an id the text stands for it."""
    return _key("text", text), _key("text", text) if doc_id is None else _key("id", doc_id)


def _key(kind: str, content: str) -> int:
    """Return 64 bits that are equal for equal contents; for others once in 2**64."""
    person = kind.encode()
    digest = hashlib.blake2b(content.encode(), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little", signed=True)


def num_tokens(groups: Sequence[CandidateTokens]) -> int:
    """Return the tokens of all pairs, as if nothing were shared."""
    return sum(
        int(group.lengths.sum()) + len(group.lengths) * (len(group.before) + len(group.after))
        for group in groups
    )
