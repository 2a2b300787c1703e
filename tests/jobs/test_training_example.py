"""`make training-example`: from a corpus to a better model of it, also where each job is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import assets
from tests.processes import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

MADE = ("*.parquet", "*.safetensors", "*.faiss")
"""What a job that has done something leaves behind."""


def recipe() -> list[str]:
    """Return the commands of the target, without those that make the virtual environment."""
    make = ["make", "--dry-run", "training-example", f"PY={sys.executable}"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = said.replace("\\\n", " ").splitlines()
    first = next(i for i, line in enumerate(lines) if "assets smollm2 minilm" in line)
    return lines[first:]


def place_at(folder: Path) -> Path:
    """Return a folder in which the commands find what they name."""
    folder.mkdir()
    for name in ("jobs", "qbatch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def num_made(place: Path) -> int:
    return sum(1 for pattern in MADE for _ in (place / "training-example").rglob(pattern))


def run(command: str, place: Path, *, kill: bool = False) -> dict | None:
    """Run a command; return its summary, None if it was killed at the first thing it made."""
    log = place / "log"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    before = num_made(place)
    while kill and process.poll() is None:
        if num_made(place) > before:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            time.sleep(5)  # its Ray notices and ends
            return None
        time.sleep(0.02)
    said, _ = process.communicate()
    assert process.returncode == 0, f"{command}:\n{log.read_text()[-3000:]}"
    lines = said.splitlines()
    return json.loads(lines[-1]) if "jobs/" in command else {}


@pytest.fixture(scope="module")
def commands() -> list[str]:
    assets.smollm2()
    assets.minilm()
    found = recipe()
    assert sum("jobs/" in command for command in found) == 9
    return found


@pytest.fixture(scope="module")
def unbroken(commands, tmp_path_factory) -> tuple[Path, list[dict]]:
    place = place_at(tmp_path_factory.mktemp("example") / "place")
    return place, [run(command, place) for command in commands]


def test_the_merged_model_answers_the_questions_at_least_as_well(unbroken):
    place, summaries = unbroken
    assert "Failed to query" not in (place / "log").read_text()  # Ray Train, without a dashboard
    before, after = (s["mean_retrieval"]["ndcg@10"] for s in summaries[-2:])
    print(f"nDCG@10 {before:.4f}, after the example {after:.4f}")
    assert after > before - 0.01


def test_each_job_killed_and_run_again_ends_with_the_same_model(commands, unbroken):
    """In the same place: which documents are drawn, and by what seed, goes by where they lie."""
    place, summaries = unbroken
    whole = (place / "training-example").rename(place / "unbroken")
    num_killed, found = 0, []
    for command in commands:
        if "jobs/" in command and "evaluate.py" not in command:
            num_killed += run(f"exec {command}", place, kill=True) is None
        found.append(run(command, place))
    assert num_killed >= 6
    assert found[-1]["mean_retrieval"] == summaries[-1]["mean_retrieval"]
    sides = (whole, place / "training-example")
    models = [side / "merged" / "model.safetensors" for side in sides]
    assert models[0].read_bytes() == models[1].read_bytes()
