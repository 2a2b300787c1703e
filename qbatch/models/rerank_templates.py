"""The token ids and strings of which the prompt around a pair is made, for each kind of scorer."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from qbatch.errors import ConfigError
from qbatch.models.rerank_prompts import (
    DOCUMENT_LABEL,
    JUDGE_END,
    JUDGE_START,
    NO,
    PASSAGE_LABEL,
    QUESTION_LABEL,
    YES,
    judge_opening,
)

ScorerName = Literal["yes-no", "query-likelihood", "cross-encoder"]

_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTemplate:
    """A prompt in parts: opening, first text, middle, second text, closing.

    ``query`` and ``document`` are format strings; what stands in them is tokenized with the text.
    """

    opening: np.ndarray
    query: str
    middle: np.ndarray
    document: str
    closing: np.ndarray
    query_first: bool
    document_type: int = 0
    """Token type of all that follows the query."""


def pair_template(tokenizer: Tokenizer, scorer: ScorerName) -> Callable[[str | None], PairTemplate]:
    """Return the function from an instruction, or None, to the prompt.

    Args:
        tokenizer: As ``read_tokenizer`` gave it: with the post-processor of its model.
        scorer: Kind of model.

    Raises:
        ConfigError: The tokenizer does not fit the prompt.
    """
    return _TEMPLATES[scorer](tokenizer)


def _judge(tokenizer: Tokenizer) -> Callable[[str | None], PairTemplate]:
    """Return the prompt of Qwen3-Reranker, "variant A" of those in use: the model card's."""
    answer_ids(tokenizer)
    start, end = (_prompt_ids(tokenizer, text) for text in (JUDGE_START, JUDGE_END))

    def template(instruction: str | None) -> PairTemplate:
        opening = judge_opening(instruction)
        query, document = f" {{}}\n{DOCUMENT_LABEL}", " {}"
        parts = [_text_ids(tokenizer, text) for text in (opening, query, document)]
        if _text_ids(tokenizer, opening + query + document) != list(chain(*parts)):
            raise ConfigError(
                f"The tokenizer joins what the reranker prompt keeps apart: {opening + query!r}. "
                "Allowed are tokenizers that split between a colon and a space, as Qwen's do; "
                "set scorer to query-likelihood for this model."
            )
        return PairTemplate(
            opening=np.array([*start, *parts[0]], np.int32),
            query=query,
            middle=_NOTHING,
            document=document,
            closing=np.array(end, np.int32),
            query_first=True,
        )

    return template


def answer_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of the answers yes and no.

    Raises:
        ConfigError: An answer is not one token.
    """
    yes, no = tokenizer.token_to_id(YES), tokenizer.token_to_id(NO)
    if yes is None or no is None:
        raise ConfigError(
            f"The tokenizer has no single token for {YES!r} ({yes}) or {NO!r} ({no}); a yes-no "
            "model needs both. Set scorer to query-likelihood."
        )
    return yes, no


def _likelihood(tokenizer: Tokenizer) -> Callable[[str | None], PairTemplate]:
    """Return passage, then query: the likelihood of the query's tokens is the score."""
    encoding = tokenizer.encode("a")
    start = [i for i, s in _until_text(encoding) if s is None]
    template = PairTemplate(
        opening=np.array([*start, *_text_ids(tokenizer, PASSAGE_LABEL)], np.int32),
        document=" {}",
        middle=np.array(_text_ids(tokenizer, QUESTION_LABEL), np.int32),
        query=" {}",
        closing=_NOTHING,
        query_first=False,
    )
    return lambda _: template


def _until_text(encoding: Encoding) -> list[tuple[int, int | None]]:
    """Return (id, sequence) of the special tokens before the first text."""
    pairs = list(zip(encoding.ids, encoding.sequence_ids, strict=True))
    return pairs[: encoding.sequence_ids.index(0)]


def _classify(tokenizer: Tokenizer) -> Callable[[str | None], PairTemplate]:
    """Return the special tokens that the tokenizer itself puts around a pair of texts."""
    encoding = tokenizer.encode("a", "a")
    sequences = encoding.sequence_ids
    first, last = sequences.index(0), len(sequences) - 1 - sequences[::-1].index(0)
    second, end = sequences.index(1), len(sequences) - 1 - sequences[::-1].index(1)
    types = encoding.type_ids
    if first > second or len(set(types[:second])) > 1 or types[0] or len(set(types[second:])) > 1:
        raise ConfigError(
            f"Unsupported layout of pairs: texts {sequences}, types {types}. Allowed are the query "
            "first, of type 0, then the document, of one type. Choose another cross-encoder."
        )
    template = PairTemplate(
        opening=np.array(encoding.ids[:first], np.int32),
        query="{}",
        middle=np.array(encoding.ids[last + 1 : second], np.int32),
        document="{}",
        closing=np.array(encoding.ids[end + 1 :], np.int32),
        query_first=True,
        document_type=types[-1],
    )
    return lambda _: template


def _prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text of ours, in which special tokens are special."""
    tokenizer.encode_special_tokens = False
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = True


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


_TEMPLATES = {"yes-no": _judge, "query-likelihood": _likelihood, "cross-encoder": _classify}
