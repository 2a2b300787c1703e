"""The commands of README run as written, in order, on small inputs with small models.

Only names stand for something else: buckets, models, servers, and the steps of a training run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3fs

from qbatch.storage import Storage
from qbatch.training.model_files import starting_model
from qbatch.training.task import Start
from tests import assets
from tests.chat_server import chat_server
from tests.processes import ROOT
from tests.test_readme import COMMANDS, job_of
from tests.tiny_models import write_tiny_judge, write_tiny_start
from tests.training_pairs import VOCABULARY, WORDS, note, write_pairs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_DOCUMENTS = 400
BUCKET = "s3://readme"

QUICKSTART = [
    ["python", "jobs/embed_corpus.py", "--config", "jobs/configs/quickstart-embed.toml"],
    ["python", "jobs/build_index.py", "--config", "jobs/configs/quickstart-index.toml"],
]
"""What `make quickstart` has left when the commands after it are read."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory, s3_endpoint) -> Path:
    """A directory like a clone, with inputs beside the code and in a bucket."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("jobs", "qbatch", "tests"):
        (folder / name).symlink_to(ROOT / name)
    s3fs.S3FileSystem().mkdir(BUCKET.removeprefix("s3://"))
    for uri in (f"{folder}/my", BUCKET):
        write_corpus(Storage(uri))
    for path in ("beir/scifact", "my/beir"):
        write_beir(folder / path)
    for name, rows in {"synthetic": 2500, "labelled": 600}.items():
        file = write_pairs(folder / f"{name}.parquet", rows)
        Storage(f"{BUCKET}/{name}").write("pairs.parquet", file.read_bytes())
    write_models(folder)
    (folder / "people.txt").write_text("a nurse\na cook\na pilot\na smith\na clerk\n")
    return folder


def write_models(folder: Path) -> None:
    """Write small random models of the Qwen3 architecture."""
    for name in ("start", "embedder", "judge"):
        (folder / name).mkdir()
    start = write_tiny_start(folder / "start", words=VOCABULARY)
    given = Start(model=None, revision=None, init_config=str(start), seed=0)
    starting_model(given, "embedder", folder / "embedder")
    write_tiny_judge(folder / "judge")


def write_corpus(storage: Storage) -> None:
    """Write documents, queries in two places, and judgements."""
    rng = np.random.default_rng(0)
    words = [WORDS[i % len(WORDS)] for i in range(NUM_DOCUMENTS)]
    rows = [{"doc_id": f"d{i}", "text": f"{note(rng, w)} {i}"} for i, w in enumerate(words)]
    asked = [{"query_id": f"q{i}", "text": f"find {word}"} for i, word in enumerate(WORDS)]
    storage.write("corpus/a.jsonl", lines(rows))
    for path in ("queries.jsonl", "queries/a.jsonl"):
        storage.write(path, lines(asked))
    judged = [f"q{i % len(WORDS)} 0 d{i} 1" for i in range(NUM_DOCUMENTS)]
    storage.write("qrels.tsv", "\n".join(judged).encode())


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_beir(folder: Path) -> None:
    storage = Storage(str(folder))
    storage.write("corpus.jsonl", lines([{"_id": "1", "text": "a note"}]))
    storage.write("queries.jsonl", lines([{"_id": "q", "text": "an unrelated question"}]))
    storage.write("qrels/test.tsv", b"query-id\tcorpus-id\tscore\nq\t1\t1\n")


def stand_ins(url: str) -> dict[str, str]:
    """Return what is run in place of the names that README gives."""
    return {
        "RERANKER_DIR": "judge",
        "MODEL_DIR": str(assets.minilm()),
        "Qwen/Qwen3-Embedding-0.6B": "embedder",
        "Qwen/Qwen3-Reranker-4B": "judge",
        "Qwen/Qwen3-Reranker-0.6B": "judge",
        "Qwen/Qwen3-0.6B-Base": "judge",
        "1024,512,256,128": "32,16",
        "http://host:8000/v1": url,
        "s3://bucket": BUCKET,
        "/models/embedder": "embedder",  # in the image of the cluster
        "other/run": "my/run",
    }


def runnable(words: list[str], clone: Path, names: dict[str, str]) -> list[str]:
    """Return the command with stand-ins, and the last two checkpoints for those it names."""
    job = job_of(words)
    if job is None:
        raise ValueError(f"{words} runs no job")
    found = []
    for word in job[1]:
        for name, value in names.items():
            word = word.replace(name, value)  # noqa: PLW2901 - one after the other
        if "checkpoints/step-" in word:
            steps = sorted((clone / "trained" / "checkpoints").iterdir())[-2:]
            word = ",".join(map(str, steps))  # noqa: PLW2901
        found.append(word)
    return [sys.executable, job[0], *found]


def test_every_command_works_as_written(clone, capsys):
    with chat_server(misbehaves=False) as (url, _):
        names = stand_ins(url)
        before = [[*command, "--model", "MODEL_DIR"] for command in QUICKSTART[:1]] + QUICKSTART[1:]
        jobs = [words for words in COMMANDS if job_of(words) and "--help" not in words]
        for words in [*before, *jobs]:
            command = runnable(words, clone, names)
            done = subprocess.run(
                command,
                cwd=clone,
                env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            with capsys.disabled():
                print(f"\n{done.returncode} {' '.join(words)}", flush=True)
            assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
            assert re.match(r"[{\[]", done.stdout.splitlines()[-1]), done.stdout[-500:]
