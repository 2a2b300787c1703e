"""A real HTTP server that speaks the embeddings protocol of OpenAI over a real model."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qbatch.models.embedder import EmbedderConfig
from tests.http_servers import MisbehavedHandler, MisbehavedState, serving


class EmbeddingState(MisbehavedState):
    """What the server computes with."""

    def __init__(self, model: str, *, misbehaves: bool, refused: int | None, dtype: str) -> None:
        super().__init__(misbehaves=misbehaves, refused=refused)
        self.embedder = EmbedderConfig(model_path=Path(model), dtype=dtype).build()

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        with self.lock:
            ids = np.concatenate([np.array(text, np.int32) for text in texts])
            return self.embedder.embed(ids, np.array([len(text) for text in texts], np.int32))


class _Handler(MisbehavedHandler):
    served_path = "/v1/embeddings"
    field = "input"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        vectors = self.server.state.embed(body["input"])
        entries = [
            {"index": i, "embedding": _encoded(vector, body["encoding_format"])}
            for i, vector in enumerate(vectors)
        ]
        return {"data": entries[::-1]}


def _encoded(vector: np.ndarray, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


@contextmanager
def embedding_server(
    model: str, *, misbehaves: bool = True, refused: int | None = None, dtype: str = "float32"
) -> Iterator[tuple[str, EmbeddingState]]:
    """Run a server on 127.0.0.1; yield its endpoint and what it knows."""
    state = EmbeddingState(model, misbehaves=misbehaves, refused=refused, dtype=dtype)
    with serving(_Handler, state) as endpoint:
        yield endpoint, state
