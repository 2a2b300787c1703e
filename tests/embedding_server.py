"""A real HTTP server that speaks the embeddings protocol of OpenAI over a real model.

It misbehaves as real ones do: the first time it meets some requests it says 429 or 500, hangs up,
or gives broken JSON; one token it never takes.
"""

import base64
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qbatch.models.embedder import EmbedderConfig
from tests.http_servers import JsonHandler, serving

TROUBLES = ("429", "500", "hang-up", "broken-json", "fine")


class EmbeddingState:
    """What the server computes with, what it was asked, and how it is to behave."""

    def __init__(self, model: str, *, misbehaves: bool, refused: int | None, dtype: str) -> None:
        self.embedder = EmbedderConfig(model_path=Path(model), dtype=dtype).build()
        self.misbehaves = misbehaves
        self.refused = refused
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        with self.lock:
            ids = np.concatenate([np.array(text, np.int32) for text in texts])
            return self.embedder.embed(ids, np.array([len(text) for text in texts], np.int32))


class _Handler(JsonHandler):
    def answer(self, body: dict[str, Any]) -> None:
        state = self.server.state
        request = json.dumps(body["input"])
        with state.lock:
            is_first = not state.seen[request]
            state.seen[request] += 1
        trouble = TROUBLES[len(request) % len(TROUBLES)] if state.misbehaves and is_first else ""
        if self.path != "/v1/embeddings" or body["model"] == "unknown":
            self.send_json(404, {"error": "no such model"})
        elif any(state.refused in text for text in body["input"]):
            self.send_json(400, {"error": "I do not take this"})
        elif trouble in ("429", "500"):
            self.send_json(int(trouble), {"error": "later"}, {"Retry-After": "0.02"})
        elif trouble == "hang-up":
            self.connection.close()
        else:
            vectors = state.embed(body["input"])
            entries = [
                {"index": i, "embedding": _encoded(vector, body["encoding_format"])}
                for i, vector in enumerate(vectors)
            ]
            reply = {"data": entries[::-1]}
            self.send_json(200, {"data": 3} if trouble == "broken-json" else reply)


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
