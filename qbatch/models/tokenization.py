"""Texts to token ids, exactly as the model was trained, whatever the text says."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from qbatch.errors import ConfigError

QWEN3_END = "<|endoftext|>"
"""What Qwen3-Embedding reads its vector at (id 151643); ``tokenizer.eos_token`` is another one."""

_BATCH_TEXTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpec:
    """What a tokenizer needs to know of its model; it travels to processes without torch."""

    subfolder: str
    """Where tokenizer.json lies inside the model directory."""
    vocab_rows: int
    """No token id may reach this."""
    max_tokens: int
    """Longest text the model takes, special tokens included."""
    appends_end: bool
    """Whether ``QWEN3_END`` must stand after every text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Token ids of many texts, one after the other."""

    ids: np.ndarray
    """int32, shape (sum of ``lengths``,)."""
    lengths: np.ndarray
    """int32, shape (texts,); special tokens are counted."""


class TextTokenizer:
    """The model's fast tokenizer, hardened for texts of unknown origin.

    Special tokens written inside a text are text. Truncation cuts the text and keeps the special
    tokens around it. No id reaches the end of the model's embedding table.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Take over ``tokenizer``; use ``load``, which prepares it."""
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls, path: Path, max_tokens: int | None = None, spec: TokenizerSpec | None = None
    ) -> "TextTokenizer":
        """Read the tokenizer of a model directory.

        Args:
            path: What ``resolve_model`` returned.
            max_tokens: Longest text, special tokens included; None means the model's own limit.
            spec: Of this model, if known already; None reads it.

        Raises:
            ConfigError: ``max_tokens`` is out of range, or the directory is unusable.
        """
        spec = spec or _read_spec(path)
        tokenizer = read_tokenizer(path / spec.subfolder, spec)
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        max_tokens = spec.max_tokens if max_tokens is None else max_tokens
        if not special < max_tokens <= spec.max_tokens:
            raise ConfigError(
                f"max_tokens is out of range: {max_tokens}; the model at {path} takes "
                f"{special + 1} to {spec.max_tokens}. Change max_tokens."
            )
        tokenizer.enable_truncation(max_tokens)
        return cls(tokenizer, max_tokens)

    @property
    def num_special(self) -> int:
        """Number of special tokens put around every text."""
        return self._tokenizer.num_special_tokens_to_add(is_pair=False)

    @cached_property
    def backend(self) -> Tokenizer:
        """A tokenizer of bare text for a splitter: no truncation, padding or special tokens."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return without_special_tokens(tokenizer)

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the token ids of ``texts``, truncated to ``max_tokens``, with special tokens."""
        parts = [flatten(batch) for batch in encode_batches(self._tokenizer, texts)]
        if not parts:
            return TokenBatch(ids=np.empty(0, np.int32), lengths=np.empty(0, np.int32))
        ids, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        return TokenBatch(ids=ids, lengths=lengths)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Return the tokens of each bare text before truncation: int32, shape (texts,)."""
        batches = encode_batches(self.backend, texts)
        return np.fromiter(map(len, chain.from_iterable(batches)), np.int32, len(texts))


def without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Make ``tokenizer`` give the tokens of the bare text, all of them, and return it."""
    tokenizer.no_truncation()
    tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def _read_spec(path: Path) -> TokenizerSpec:
    from qbatch.models.loading import load_spec  # noqa: PLC0415 - loads transformers

    return load_spec(path).tokenizer


def read_tokenizer(folder: Path, spec: TokenizerSpec) -> Tokenizer:
    """Return the tokenizer of a model directory: special tokens in a text are text to it."""
    tokenizer = _within_rows(folder / "tokenizer.json", spec)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if spec.appends_end:
        _append_end(tokenizer, folder)
    return tokenizer


def _within_rows(file: Path, spec: TokenizerSpec) -> Tokenizer:
    """Read tokenizer.json, leaving out added tokens that the model has no row for.

    Qwen3-Embedding 4B and 8B have 151,665 rows; tokens such as ``<think>`` lie beyond and become
    plain text. Everything else beyond the rows is an error.
    """
    tokenizer = Tokenizer.from_file(str(file))
    if _largest_id(tokenizer) < spec.vocab_rows:
        return tokenizer
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < spec.vocab_rows]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if _largest_id(tokenizer) >= spec.vocab_rows:
        raise ConfigError(
            f"The tokenizer does not belong to the model: {file} has the id "
            f"{_largest_id(tokenizer)}, the embedding table has {spec.vocab_rows} rows. Copy both "
            "from one revision of the model."
        )
    return tokenizer


def _largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values())


def _append_end(tokenizer: Tokenizer, path: Path) -> None:
    """Append <|endoftext|> to every text, unless the tokenizer's own post-processor does so."""
    end = tokenizer.token_to_id(QWEN3_END)
    if end is None:
        raise ConfigError(
            f"No token {QWEN3_END!r} in the tokenizer of {path}; Qwen3-Embedding reads its vector "
            "there. Use the tokenizer that came with the model."
        )
    if tokenizer.encode("").ids[-1:] != [end]:
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {QWEN3_END}", special_tokens=[(QWEN3_END, end)]
        )


def encode_batches(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[Encoding]]:
    """Encode in batches: the encodings of a whole unit would take gigabytes."""
    for start in range(0, len(texts), _BATCH_TEXTS):
        yield tokenizer.encode_batch_fast(list(texts[start : start + _BATCH_TEXTS]))


def flatten(encodings: Iterable[Encoding]) -> tuple[np.ndarray, np.ndarray]:
    """Return all ids one after the other and the number of each text's, both int32."""
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths
