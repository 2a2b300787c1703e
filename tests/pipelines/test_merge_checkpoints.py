"""The merge job on whole model directories."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from qbatch.errors import ConfigError
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.merge_checkpoints import MergeCheckpointsConfig, merge_checkpoints
from tests.tiny_models import write_tiny_encoder


@pytest.fixture
def checkpoints(tmp_path) -> list[Path]:
    return [write_tiny_encoder(tmp_path / f"c{seed}", seed=seed) for seed in range(3)]


def config_for(checkpoints: list[Path], output: Path, **settings) -> MergeCheckpointsConfig:
    names = tuple(map(str, checkpoints))
    return MergeCheckpointsConfig(checkpoints=names, output=str(output), **settings)


def embed(path: Path) -> np.ndarray:
    tokens = TextTokenizer.load(path).encode(["one text", "another", "and a third"])
    config = EmbedderConfig(model_path=path, dtype="float32", device="cpu")
    return config.build().embed(tokens.ids, tokens.lengths)


def test_the_merged_model_is_a_model(checkpoints, tmp_path):
    output = tmp_path / "merged"
    summary = merge_checkpoints(config_for(checkpoints, output))
    assert summary["tensors"] == len(load_file(output / "model.safetensors"))
    assert json.loads((output / "report.json").read_text()) == summary
    vectors = embed(output)
    assert np.isfinite(vectors).all()
    assert not np.allclose(vectors, embed(checkpoints[0]), atol=1e-3)
    assert [p.name for p in output.glob(".partial-*")] == []


def test_all_weight_on_one_checkpoint_gives_that_checkpoint(checkpoints, tmp_path):
    output = tmp_path / "merged"
    merge_checkpoints(config_for(checkpoints, output, weights=(3.0, 0.0, 0.0)))
    np.testing.assert_array_equal(embed(output), embed(checkpoints[0]))


def test_running_again_changes_nothing_and_another_merge_is_refused(checkpoints, tmp_path):
    output = tmp_path / "merged"
    merge_checkpoints(config_for(checkpoints, output))
    before = (output / "model.safetensors").stat().st_mtime_ns
    again = merge_checkpoints(config_for(checkpoints, output))
    assert again["tensors"] == 0
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds another model"):
        merge_checkpoints(config_for(checkpoints, output, method="spherical-mean"))


def test_a_dry_run_writes_nothing(checkpoints, tmp_path):
    summary = merge_checkpoints(config_for(checkpoints, tmp_path / "merged", dry_run=True))
    assert summary["weight_bytes"] == (checkpoints[0] / "model.safetensors").stat().st_size
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "differ: hidden_act: 'gelu' and 'relu'"),
        ("tokenizer.json", {"version": "2"}, "have different tokenizers"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "differ: pooling_mode_cls"),
    ],
)
def test_checkpoints_of_different_models_are_refused(checkpoints, tmp_path, name, change, message):
    file = checkpoints[1] / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        merge_checkpoints(config_for(checkpoints, tmp_path / "merged"))


def test_the_version_of_transformers_may_differ(checkpoints, tmp_path):
    file = checkpoints[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "4.0"}))
    merge_checkpoints(config_for(checkpoints, tmp_path / "merged"))
    assert (tmp_path / "merged" / "complete.json").exists()


def test_files_of_a_training_run_stay_behind(checkpoints, tmp_path):
    (checkpoints[0] / "report.json").write_text("{}")
    (checkpoints[0] / "checkpoints").mkdir()
    shutil.copy(checkpoints[0] / "config.json", checkpoints[0] / "checkpoints")
    merge_checkpoints(config_for(checkpoints, tmp_path / "merged"))
    assert not (tmp_path / "merged" / "checkpoints").exists()
    assert json.loads((tmp_path / "merged" / "report.json").read_text())["kind"] == "merged-model"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoints": ("a",)}, "give two or more"),
        ({"weights": (1.0,)}, "1 weights for 2 checkpoints"),
        ({"weights": (0.0, 1.0)}, "the first above 0"),
        ({"weights": (1.0, -1.0)}, "numbers of 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MergeCheckpointsConfig(**{"checkpoints": ("a", "b"), "output": "out"} | settings)
