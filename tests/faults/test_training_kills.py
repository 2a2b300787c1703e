"""Killed in the middle and run again, a training ends with the very weights of an unbroken one."""

import json
from pathlib import Path

import pytest

from tests.processes import Job, wait_until
from tests.tiny_models import write_tiny_start
from tests.training_pairs import VOCABULARY, write_pairs

pytestmark = [pytest.mark.ray]


def num_saved(output: Path) -> int:
    return len(list(output.glob("checkpoints/*/complete.json")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_training_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "start").mkdir()
    start = write_tiny_start(tmp_path / "start", words=VOCABULARY)
    pairs = write_pairs(tmp_path / "pairs.parquet", 400)
    flags = {
        "pairs": pairs,
        "init_config": start,
        "batch_size": 16,
        "epochs": 8,
        "learning_rate": 0.003,
        "instruction": "find",
        "dtype": "float32",
        "checkpoint_every": 5,
        "keep_checkpoints": 50,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start_job(output: Path, log: str) -> Job:
        return Job("train_embedder.py", flags | {"output": output}, tmp_path / log)

    code, _ = start_job(whole, "whole.log").wait(600)
    assert code == 0, (tmp_path / "whole.log").read_text()[-3000:]
    for target in (1, 4):
        job = start_job(cut, f"cut-{target}.log")
        assert wait_until(lambda target=target: num_saved(cut) >= target, job, 300)
        job.kill(patience_s=0)  # the worker would be done before it misses the driver
        assert not (cut / "complete.json").exists()
    code, summary = start_job(cut, "last.log").wait(600)
    assert code == 0, (tmp_path / "last.log").read_text()[-3000:]
    assert summary["resumed_from_step"] > 0
    for name in ("model.safetensors", "checkpoints/step-00000200/model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    curves = [json.loads((side / "report.json").read_text())["curve"] for side in (whole, cut)]
    assert curves[0] == curves[1]
