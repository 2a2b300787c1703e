"""What the servers of tests share: real HTTP on 127.0.0.1, JSON in and out, in a thread."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TROUBLES = ("429", "500", "hang-up", "broken-json", "fine")


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and sends JSON, and counts what it sends in the state's ``statuses``."""

    server: "_Server"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        raise NotImplementedError

    def send_json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.server.state.statuses[status] += 1
        self.send_response(status)
        for name, content in (headers or {}).items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class MisbehavedState:
    """What a server of token ids was asked, and how it is to behave."""

    def __init__(self, *, misbehaves: bool, refused: int | None) -> None:
        self.misbehaves = misbehaves
        self.refused = refused
        """A token that it never takes."""
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()


class MisbehavedHandler(JsonHandler):
    """Serves texts given as token ids, as real servers do.

    The first time it meets some requests it says 429 or 500, hangs up, or gives broken JSON.
    """

    served_path: str
    field: str
    """Of a request: holds the texts."""

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the right answer."""
        raise NotImplementedError

    def answer(self, body: dict[str, Any]) -> None:
        state = self.server.state
        request = json.dumps(body[self.field])
        with state.lock:
            is_first = not state.seen[request]
            state.seen[request] += 1
        trouble = TROUBLES[len(request) % len(TROUBLES)] if state.misbehaves and is_first else ""
        if self.path != self.served_path or body["model"] == "unknown":
            self.send_json(404, {"error": "no such model"})
        elif any(state.refused in text for text in body[self.field]):
            self.send_json(400, {"error": "I do not take this"})
        elif trouble in ("429", "500"):
            self.send_json(int(trouble), {"error": "later"}, {"Retry-After": "0.02"})
        elif trouble == "hang-up":
            self.connection.close()
        elif trouble == "broken-json":
            self.send_json(200, {"data": 3, "choices": [[]]})
        else:
            self.send_json(200, self.reply(body))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    state: Any

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed, and connections closed on purpose


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], state: object) -> Iterator[str]:
    """Run a server in a thread; yield its endpoint."""
    server = _Server(("127.0.0.1", 0), handler)
    server.state = state
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
