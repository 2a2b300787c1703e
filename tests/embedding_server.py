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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from qbatch.models.embedder import EmbedderConfig

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


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = json.dumps(body["input"])
        with state.lock:
            is_first = not state.seen[request]
            state.seen[request] += 1
        trouble = TROUBLES[len(request) % len(TROUBLES)] if state.misbehaves and is_first else ""
        if self.path != "/v1/embeddings" or body["model"] == "unknown":
            self._send(404, {"error": "no such model"})
        elif any(state.refused in text for text in body["input"]):
            self._send(400, {"error": "I do not take this"})
        elif trouble in ("429", "500"):
            self._send(int(trouble), {"error": "later"}, {"Retry-After": "0.02"})
        elif trouble == "hang-up":
            self.connection.close()
        else:
            vectors = state.embed(body["input"])
            entries = [
                {"index": i, "embedding": _encoded(vector, body["encoding_format"])}
                for i, vector in enumerate(vectors)
            ]
            reply = {"data": entries[::-1]}
            self._send(200, {"data": 3} if trouble == "broken-json" else reply)

    def _send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        with self.server.state.lock:
            self.server.state.statuses[status] += 1
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def _encoded(vector: np.ndarray, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: EmbeddingState


@contextmanager
def embedding_server(
    model: str, *, misbehaves: bool = True, refused: int | None = None, dtype: str = "float32"
) -> Iterator[tuple[str, EmbeddingState]]:
    """Run a server on 127.0.0.1; yield its endpoint and what it knows."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = EmbeddingState(model, misbehaves=misbehaves, refused=refused, dtype=dtype)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
