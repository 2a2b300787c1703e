"""Queries and their candidates to token ids, on processes without torch.

Every pair of one query is the same tokens before the document, the document's own, and the same
tokens after it. The parts are tokenized apart. That gives the ids of the official sample, which
tokenizes its body as one string, because the parts meet where the tokenizer splits anyhow: between
a colon and a space that a character of the text follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qbatch.errors import ConfigError
from qbatch.models.rerank_templates import PairTemplate, ScorerName, pair_template
from qbatch.models.tokenization import (
    TokenizerSpec,
    encode_batches,
    flatten,
    read_tokenizer,
    without_special_tokens,
)

MIN_DOCUMENT_TOKENS = 16
"""A query that leaves less room for its documents is rejected: a score would say nothing."""

QUERY_TOO_LONG = "query_too_long"
"""Reason of a rejected query, a stable code."""

_DEFAULT_MAX_TOKENS = 8_192
"""As in the Qwen3-Reranker model card, where the model takes more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTokenizerSpec:
    """What a process that tokenizes pairs needs to know of the model; it loads no torch."""

    scorer: ScorerName
    tokenizer: TokenizerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateGroup:
    """A query and the documents to be ranked for it."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None
    """Task sentence in English, for yes-no models; None means that of the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateTokens:
    """A query and its documents as the model reads them: ``before``, the document, ``after``."""

    before: np.ndarray
    """int32: the tokens before every document."""
    after: np.ndarray
    """int32: the tokens after every document."""
    ids: np.ndarray
    """int32, shape (sum of ``lengths``,): the documents one after the other."""
    lengths: np.ndarray
    """int32, shape (documents,): tokens of each document, after truncation; may be 0."""
    num_scored: int = 0
    """How many of the last tokens are the query whose likelihood is measured."""
    document_type: int = 0
    """Token type of documents and ``after``; ``before`` has 0."""
    num_truncated: int = 0
    """Documents that lost tokens at their end."""
    reason: str | None = None
    """Why the query was rejected, else None; its documents have no tokens then."""
    detail: str | None = None
    """The reason in words and numbers."""

    def take(self, rows: np.ndarray) -> "CandidateTokens":
        """Return the query with these of its documents, in the order of ``rows``."""
        documents = np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []
        ids = [np.empty(0, np.int32), *(documents[row] for row in rows)]
        return replace(self, ids=np.concatenate(ids), lengths=self.lengths[rows])


class PairTokenizer:
    """The model's tokenizer and the prompt around pairs.

    Only documents are truncated, at their end; prompt and query stay whole. Special tokens written
    inside a query, a document or an instruction are text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scorer: ScorerName,
        *,
        max_tokens: int,
        instruction: str | None = None,
    ) -> None:
        """Take over ``tokenizer``; use ``load``, which checks the settings."""
        self.max_tokens = max_tokens
        self._scorer = scorer
        self._instruction = instruction
        self._template = lru_cache(maxsize=64)(pair_template(tokenizer, scorer))
        self._tokenizer = without_special_tokens(tokenizer)

    @classmethod
    def load(
        cls,
        path: Path,
        spec: PairTokenizerSpec,
        *,
        max_tokens: int | None = None,
        instruction: str | None = None,
    ) -> "PairTokenizer":
        """Read the tokenizer of a model directory.

        Args:
            path: What ``resolve_model`` returned.
            spec: ``RerankerSpec.tokenizer`` of this model.
            max_tokens: Longest pair, prompt included; None means the model's limit, at most 8,192.
            instruction: Task sentence in English; None means the model card's. Only for yes-no.

        Raises:
            ConfigError: ``max_tokens`` is out of range, or the model takes no instruction.
        """
        limit = spec.tokenizer.max_tokens
        max_tokens = min(limit, _DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens
        if not MIN_DOCUMENT_TOKENS < max_tokens <= limit:
            raise ConfigError(
                f"max_tokens is out of range: {max_tokens}; the model at {path} takes "
                f"{MIN_DOCUMENT_TOKENS + 1} to {limit}. Change max_tokens."
            )
        _check_instruction(instruction, spec.scorer)
        tokenizer = read_tokenizer(path / spec.tokenizer.subfolder, spec.tokenizer)
        return cls(tokenizer, spec.scorer, max_tokens=max_tokens, instruction=instruction)

    def encode(self, groups: Sequence[CandidateGroup]) -> list[CandidateTokens]:
        """Return the tokens of each group, in order.

        A query that leaves fewer than ``MIN_DOCUMENT_TOKENS`` for its documents comes back without
        tokens and with a reason.

        Raises:
            ConfigError: A group has an instruction, and the model takes none.
        """
        frames = [self._frame(group) for group in groups]
        texts = chain.from_iterable(
            (frame.template.document.format(text) for text in group.documents)
            for group, frame in zip(groups, frames, strict=True)
            if frame.room(self.max_tokens) >= MIN_DOCUMENT_TOKENS
        )
        parts = [flatten(batch) for batch in encode_batches(self._tokenizer, list(texts))]
        ids, lengths = (
            np.concatenate([np.empty(0, np.int32), *(part[i] for part in parts)]) for i in (0, 1)
        )
        encoded = iter(np.split(ids, np.cumsum(lengths)))
        return [
            self._finish(frame, [next(encoded) for _ in group.documents])
            if frame.room(self.max_tokens) >= MIN_DOCUMENT_TOKENS
            else self._reject(frame, len(group.documents))
            for group, frame in zip(groups, frames, strict=True)
        ]

    def _frame(self, group: CandidateGroup) -> "_Frame":
        _check_instruction(group.instruction, self._scorer)
        template = self._template(group.instruction or self._instruction)
        query = self._ids(template.query.format(group.query))
        if template.query_first:
            before = np.concatenate([template.opening, query, template.middle])
            return _Frame(template=template, before=before, after=template.closing)
        after = np.concatenate([template.middle, query, template.closing])
        return _Frame(
            template=template, before=template.opening, after=after, num_scored=len(query)
        )

    def _finish(self, frame: "_Frame", documents: list[np.ndarray]) -> CandidateTokens:
        room = frame.room(self.max_tokens)
        cut = [document[:room] for document in documents]
        return CandidateTokens(
            before=frame.before,
            after=frame.after,
            ids=np.concatenate([np.empty(0, np.int32), *cut]),
            lengths=np.array([len(document) for document in cut], np.int32),
            num_scored=frame.num_scored,
            document_type=frame.template.document_type,
            num_truncated=sum(len(document) > room for document in documents),
        )

    def _reject(self, frame: "_Frame", num_documents: int) -> CandidateTokens:
        nothing = np.empty(0, np.int32)
        return CandidateTokens(
            before=nothing,
            after=nothing,
            ids=nothing,
            lengths=np.zeros(num_documents, np.int32),
            reason=QUERY_TOO_LONG,
            detail=f"query and prompt take {len(frame.before) + len(frame.after)} of "
            f"{self.max_tokens} tokens; {MIN_DOCUMENT_TOKENS} must be left for a document",
        )

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """What stands around every document of one query."""

    template: PairTemplate
    before: np.ndarray
    after: np.ndarray
    num_scored: int = 0

    def room(self, max_tokens: int) -> int:
        return max_tokens - len(self.before) - len(self.after)


def scores_from_keys(keys: np.ndarray, scorer: ScorerName) -> np.ndarray:
    """Return scores from 0 to 1 of ranking keys, float32; rank by the keys, scores saturate.

    The sigmoid of log-odds; of a mean log-likelihood its exponential, a token's mean probability.
    """
    keys = keys.astype(np.float64)
    if scorer != "query-likelihood":
        keys = -np.logaddexp(0, -keys)
    scores: np.ndarray = np.exp(keys)
    return scores.astype(np.float32)


def _check_instruction(instruction: str | None, scorer: ScorerName) -> None:
    if instruction is not None and scorer != "yes-no":
        raise ConfigError(
            f"An instruction was given for a model that takes none: {instruction!r} for a "
            f"{scorer} model; only yes-no models take one. Remove the instruction."
        )
