"""MTEB's tasks by name, from a server that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from qbatch.pipelines.evaluation_sets import EvaluationSet, resolve_set
from qbatch.quickstart import bundled
from tests.http_servers import serving
from tests.processes import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "corpus.jsonl": b'{"_id": "d0", "title": "", "text": "a debugger for memory"}\n'
    b'{"_id": "d1", "title": "", "text": "a web server"}\n',
    "queries.jsonl": b'{"_id": "q0", "text": "serve pages on the web"}\n',
    "qrels/test.jsonl": b'{"query-id": "q0", "corpus-id": "d1", "score": 1.0}\n',
    "README.md": b"never asked for",
    "load.py": b"raise SystemExit('code of a dataset ran')",
}
REPOSITORIES = {
    "mteb/tiny": FILES,
    "mteb/labels": {"test.jsonl": b'{"text": "x", "label": 1}\n'},
}


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The requests that a download makes: the commit, the files there are, and each of them."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.state.append(self.path)
        for name, files in REPOSITORIES.items():
            about = f"/api/datasets/{name}"
            if self.path.startswith(f"{about}/revision/"):
                return self._answer(200, json.dumps({"id": name, "sha": COMMIT}).encode())
            if self.path.startswith(f"{about}/tree/"):
                tree = [
                    {"type": "file", "path": path, "size": len(body), "oid": digest(body)}
                    for path, body in files.items()
                ]
                return self._answer(200, json.dumps(tree).encode())
            prefix = f"/datasets/{name}/resolve/{COMMIT}/"
            if self.path.startswith(prefix):
                return self._answer(200, files[self.path.removeprefix(prefix)])
        return self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a running hub, and the paths that were asked for."""
    asked: list[str] = []
    with serving(Hub, asked) as endpoint:
        yield endpoint.removesuffix("/v1"), asked


def evaluate(datasets: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    flags = [
        f"--model={bundled.MODELS / 'embedder'}",
        f"--datasets={datasets}",
        "--metrics=ndcg@10",
    ]
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *flags],
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_task_is_downloaded_once_and_its_commit_reported(hub, tmp_path):
    endpoint, asked = hub
    done = evaluate(f"mteb:tiny@{COMMIT}", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout.splitlines()[-1])["tasks"]["tiny"]
    assert (task["revision"], task["queries"], task["documents"]) == (COMMIT, 1, 2)
    assert task["retrieval"]["metrics"] == {"ndcg@10": 1.0}
    assert not [path for path in asked if path.endswith((".md", ".py"))]
    num_asked = len([path for path in asked if "/resolve/" in path])
    assert evaluate(f"mteb:tiny@{COMMIT}", endpoint, tmp_path).returncode == 0
    assert len([path for path in asked if "/resolve/" in path]) == num_asked


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("mteb:unknown", "did not deliver 'mteb:unknown' of --datasets"),
        ("mteb:labels", "'mteb:labels' of --datasets has no qrels/"),
        ("mteb:../tiny", "did not deliver 'mteb:../tiny' of --datasets"),
    ],
)
def test_what_is_no_task_is_refused(hub, tmp_path, datasets, message):
    done = evaluate(datasets, hub[0], tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_folders_stay_where_they_are():
    expected = EvaluationSet(name="scifact", uri="s3://bucket/beir/scifact/")
    assert resolve_set("s3://bucket/beir/scifact/") == expected
