"""An embedding server in place of a model in this process: token ids in, vectors out.

vLLM, TEI and other OpenAI-compatible servers take token ids for texts, so that prompts, special
tokens and truncation are ours and exact. Imports no torch.
"""

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qbatch.errors import ConfigError
from qbatch.models.embed_stats import EmbedStats
from qbatch.models.packing import distinct_texts, plan_packs
from qbatch.models.server import Server, ServerConfig, field_of

_TOKENS_PER_REQUEST = 8_192
_TEXTS_PER_REQUEST = 64


class RemoteEmbedder:
    """Embeds texts given as token ids, as ``Embedder`` does, by asking a server.

    A text that the server refuses, or fails over again and again, gets a row of NaN.
    """

    def __init__(
        self, config: ServerConfig, *, dim: int, normalize: bool, token_budget: int | None = None
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            config: Which server.
            dim: Leading components kept (Matryoshka).
            normalize: Whether rows get unit length.
            token_budget: Tokens of one request, about; None is 8,192.
        """
        self.dim = dim
        self.stats = EmbedStats()
        self.token_budget = token_budget or _TOKENS_PER_REQUEST
        self._normalize = normalize
        self._server = Server(config, "/embeddings")

    def embed(
        self, ids: np.ndarray, lengths: np.ndarray, on_pack: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Return one vector per text, in the order given: float32, shape (texts, dim).

        Args:
            ids: int32, the texts one after the other.
            lengths: int32, tokens of each text.
            on_pack: Called before the requests are sent, and as each is answered.

        Raises:
            ConfigError: The server refuses the key, knows no such model, or has narrower vectors.
            StalledError: The server answers nobody any more.
        """
        started = time.perf_counter()
        first, inverse = distinct_texts(ids, lengths)
        texts = [t.tolist() for t in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []
        requests = [
            first[part]
            for pack in plan_packs(lengths[first], self.token_budget)
            for part in np.split(pack, range(_TEXTS_PER_REQUEST, len(pack), _TEXTS_PER_REQUEST))
        ]
        matrix = np.full((len(lengths), self.dim), np.nan, np.float32)
        on_pack()
        for rows, vectors in zip(requests, self._ask(requests, texts, on_pack), strict=True):
            matrix[rows] = vectors
        matrix = matrix[first[inverse]] if len(lengths) else matrix
        self._count(lengths, first, len(requests), time.perf_counter() - started)
        return matrix

    def _ask(
        self, requests: list[np.ndarray], texts: list[list[int]], on_pack: Callable[[], None]
    ) -> list[np.ndarray]:
        def read(data: bytes) -> list[np.ndarray]:
            on_pack()
            return _vectors(data)

        batches = [[texts[row] for row in rows] for rows in requests]
        nothing = np.full(self.dim, np.nan, np.float32)
        return [
            np.stack([nothing if vector is None else self._finished(vector) for vector in vectors])
            for vectors in self._server.ask_batches(batches, _body, read)
        ]

    def _finished(self, vector: np.ndarray) -> np.ndarray:
        """Return a vector of the width that is asked for, scaled if it is to be."""
        if len(vector) < self.dim:
            raise ConfigError(
                f"the server gives vectors of {len(vector)} components, --model has {self.dim}; "
                "serve the same model, or ask for fewer --dims"
            )
        cut = vector[: self.dim]
        return cut / np.linalg.norm(cut) if self._normalize else cut

    def _count(
        self, lengths: np.ndarray, first: np.ndarray, num_requests: int, seconds: float
    ) -> None:
        num_tokens = int(lengths[first].sum())
        self.stats.num_texts += len(lengths)
        self.stats.num_distinct += len(first)
        self.stats.num_packs += num_requests
        self.stats.num_tokens += num_tokens
        self.stats.num_computed += num_tokens
        self.stats.embed_s += seconds


def _body(texts: Sequence[list[int]]) -> dict[str, Any]:
    return {"input": texts, "encoding_format": "base64"}


def _vectors(data: bytes) -> list[np.ndarray]:
    """Read a reply in the order of its texts; ValueError for anything that is none."""
    return field_of(
        data,
        "a list of embeddings",
        lambda reply: [
            _vector(entry["embedding"])
            for entry in sorted(reply["data"], key=lambda entry: entry["index"])
        ],
    )


def _vector(embedding: str | list[float]) -> np.ndarray:
    """Return what base64 of little-endian float32, or a list of numbers, stands for."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.asarray(embedding, np.float32)
