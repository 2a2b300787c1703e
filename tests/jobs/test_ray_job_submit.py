"""Jobs as users start them on a cluster: ``ray start`` and ``ray job submit``."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbatch.release import open_release, release_numbers
from qbatch.storage import Storage
from qbatch.tables import open_vectors
from tests.nights import Corpus, write_queries
from tests.processes import ROOT, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

RAY = str(Path(sys.executable).with_name("ray"))


NIGHT = """
output = "{uri}/night"
[embed]
input = "{uri}/corpus"
model = "{model}"
dtype = "float32"
[index]
factory = "Flat"
num_probes = 20
[answers]
queries = "{uri}/queries.jsonl"
top_k = 5
num_partitions = 2
"""

SECRETS = {"AWS_SECRET_ACCESS_KEY": secrets.token_hex(20), "QBATCH_API_KEY": secrets.token_hex(20)}
"""In the environment of every process of the cluster, as an operator gives them."""


@pytest.fixture(scope="module")
def ray_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def cluster(ray_folder) -> Iterator[dict[str, str]]:
    """A Ray head with its own ports and folder; yields the environment of its clients."""
    folder = ray_folder
    port, dashboard, client, agent = (free_port() for _ in range(4))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **SECRETS,
    }
    command = [
        *(RAY, "start", "--head", "--block", "--disable-usage-stats"),
        *("--num-cpus=2", "--num-gpus=0", "--object-store-memory=500000000"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"),
        *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        f"--dashboard-agent-listen-port={agent}",
    ]
    log = (folder / "head.log").open("wb")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_dashboard(environment, folder / "head.log")
        yield environment
    finally:
        head.terminate()  # --block takes its own processes down with it
        head.wait(timeout=60)


def wait_for_dashboard(environment: dict[str, str], log: Path) -> None:
    for _ in range(30):
        listed = subprocess.run(
            [RAY, "job", "list"], env=environment, capture_output=True, text=True, check=False
        )
        if listed.returncode == 0:
            return
    raise TimeoutError(f"no dashboard: {listed.stderr[-1000:]}\n{log.read_text()[-2000:]}")


def submit(environment: dict[str, str], job: str, *flags: str) -> subprocess.CompletedProcess:
    """Run a job with the repository as its working directory."""
    command = [RAY, "job", "submit", "--working-dir", str(ROOT), "--"]
    return subprocess.run(
        [*command, "python", f"jobs/{job}", *flags],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_logs_progress_and_summary_arrive(cluster, tiny_model, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"doc_id": str(i), "text": f"text {i}"} for i in range(50)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--input={corpus}", f"--output={tmp_path / 'out'}", f"--model={tiny_model}"]
    done = submit(cluster, "embed_corpus.py", *flags, "--dtype=float32")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert "1/1 units" in output
    summary = next(json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"generation"'))
    assert (summary["rows_in"], summary["units_made"]) == (50, 1)
    assert open_vectors(str(tmp_path / "out")).num_rows == 50


def test_exit_codes_arrive(cluster, tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = [f"--input={tmp_path / 'empty'}", f"--output={tmp_path / 'out'}"]
    done = submit(cluster, "embed_corpus.py", *flags, f"--model={tiny_model}")
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "exit code 3" in output
    assert "no object to read under" in output


def test_a_night_releases_and_a_failed_gate_arrives(cluster, tiny_model, tmp_path):
    uri = str(tmp_path)
    Corpus(f"{uri}/corpus").write()
    write_queries(f"{uri}/queries.jsonl")
    night = tmp_path / "night.toml"
    night.write_text(NIGHT.format(uri=uri, model=tiny_model))
    done = submit(cluster, "reindex.py", f"--config={night}")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    summary = next(json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"release"'))
    assert (summary["release"], summary["released"]) == (1, True)
    assert "published generation 1" in output
    assert open_release(f"{uri}/night").open("vectors").num_rows == 60

    Corpus(f"{uri}/corpus", num_files=1).write()
    done = submit(cluster, "reindex.py", f"--config={night}")
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "exit code 7" in output
    assert "documents lost since the last release" in output
    assert release_numbers(Storage(f"{uri}/night")) == [1]


def test_secrets_of_the_environment_reach_no_log_and_no_table(cluster, ray_folder):
    """Of the jobs above: logs of Ray and of the jobs, manifests and reports."""
    written = [p for p in ray_folder.parent.rglob("*") if p.is_file() and not p.is_symlink()]
    logs = [p for p in written if p.suffix in (".log", ".out", ".err")]
    reports = [p for p in written if p.name in ("report.json", "report.html")]
    manifests = [p for p in written if p.parent.name == "manifests"]
    assert logs
    assert reports
    assert manifests
    listed = subprocess.run(
        [RAY, "job", "list"], env=cluster, capture_output=True, text=True, check=True
    )
    assert "SUCCEEDED" in listed.stdout + listed.stderr
    for secret in [*SECRETS.values(), cluster["RAY_AUTH_TOKEN"]]:
        assert secret not in listed.stdout + listed.stderr
        assert [p for p in written if secret.encode() in p.read_bytes()] == []
