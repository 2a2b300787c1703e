"""The training jobs on Ray Train: workers, sharding, refusals, and what a dry run tells."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from qbatch.cli import parse
from qbatch.errors import BadInputError, ConfigError, NoInputError
from qbatch.pipelines.train_embedder import TrainEmbedderConfig, train_embedder
from qbatch.pipelines.train_reranker import TrainRerankerConfig, train_reranker
from tests.tiny_models import write_tiny_start
from tests.training_pairs import VOCABULARY, write_pairs


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_start(tmp_path_factory.mktemp("start"), words=VOCABULARY)


def config_for(start: Path, root: Path, **settings) -> TrainEmbedderConfig:
    pairs = root / "pairs.parquet"
    if not pairs.exists():
        write_pairs(pairs, 32, num_negatives=2)
    given = {
        "pairs": (str(pairs),),
        "output": str(root / "out"),
        "init_config": str(start),
        "batch_size": (8,),
        "learning_rate": (3e-3,),
        "dims": (32, 8),
        "temperature": 0.1,
        "instruction": "find",
        "dtype": "float32",
        "max_failures": 0,
    }
    return TrainEmbedderConfig(**given | settings)


def curve(output: str) -> list[float]:
    report = json.loads(Path(output, "report.json").read_text())
    return [point["loss"] for point in report["curve"]]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_as_one_does_replicated_or_sharded(start, tmp_path):
    """Rounding aside: the same losses, and weights that hardly differ after the same steps."""
    one = config_for(start, tmp_path, output=str(tmp_path / "one"))
    summary = train_embedder(one)
    assert summary["workers"] == 1
    assert summary["steps"] == 4
    for name, settings in {"ddp": {}, "fsdp": {"sharding": "fsdp", "token_budget": 60}}.items():
        two = replace(one, output=str(tmp_path / name), num_workers=2, **settings)
        summary = train_embedder(two)
        assert summary["workers"] == 2
        np.testing.assert_allclose(curve(two.output), curve(one.output), rtol=2e-4)
        files = [Path(c.output, "model.safetensors") for c in (one, two)]
        states = [load_file(file) for file in files]
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[0].items():
            # Adam turns the sign of the smallest gradient into a whole step of the rate.
            far = (tensor - states[1][key]).abs() > 1e-4
            assert far.float().mean() < 0.02, key


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_a_finished_training_is_not_repeated_and_another_is_refused(start, tmp_path):
    config = config_for(start, tmp_path)
    summary = train_embedder(config)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train_embedder(config) == summary
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="belongs to a training with other settings"):
        train_embedder(replace(config, seed=1))
    with pytest.raises(ConfigError, match="belongs to a training with other settings"):
        train_reranker(
            TrainRerankerConfig(
                pairs=config.pairs, output=config.output, init_config=str(start), batch_size=(8,)
            )
        )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_worker_comes_out_as_itself(start, tmp_path):
    config = config_for(start, tmp_path)
    bad = write_pairs(tmp_path / "bad.parquet", 32)
    _blank_a_query(bad)
    with pytest.raises(BadInputError, match="query is null or empty in 1 rows"):
        train_embedder(replace(config, pairs=(str(bad),)))


def _blank_a_query(path: Path) -> None:
    rows = pq.read_table(path).to_pylist()
    rows[3]["query"] = ""
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_dry_run_tells_the_plan_and_starts_nothing(start, tmp_path):
    config = config_for(start, tmp_path, epochs=(3,), dry_run=True, num_workers=2)
    plan = train_embedder(config)
    assert plan["steps"] == 12
    assert plan["stages"][0]["rows"] == 32
    assert plan["trained_parameters"] == plan["parameters"] > 10_000
    assert plan["tokens_estimated"] == 12 * plan["stages"][0]["tokens_per_step"] > 12 * 8 * 20
    assert not (tmp_path / "out").exists()
    sharded = train_embedder(replace(config, sharding="fsdp"))
    assert sharded["state_gib_per_worker"] <= plan["state_gib_per_worker"]


def test_a_dry_run_of_a_reranker_counts_its_prompts(start, tmp_path):
    config = config_for(start, tmp_path)
    plan = train_reranker(
        TrainRerankerConfig(
            pairs=config.pairs, output="out", init_config=str(start), batch_size=(8,), dry_run=True
        )
    )
    assert plan["steps"] == 4
    assert plan["tokens_estimated"] > 32 * 3 * 48  # prefix and suffix alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "x"}, "give one of them"),
        ({"init_config": None}, "give one of them"),
        ({"pairs": ()}, "pairs is empty"),
        ({"epochs": (1, 2)}, "epochs has 2 values for 1 pairs tables"),
        ({"batch_size": (0,)}, "batch_size 0"),
        ({"learning_rate": (0.0,)}, "learning_rate is 0.0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"lora_rank": 4}, "adapters beside random weights"),
        ({"token_budget": 0}, "token_budget 0"),
        ({"num_workers": 0}, "num_workers 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_settings_are_refused(start, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        config_for(start, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": (33,)}, ConfigError, "batch_size 33 does not fit 32 pairs"),
        ({"num_workers": 3}, ConfigError, "and 3 workers"),
        ({"pairs": ("nowhere",)}, NoInputError, "no pairs in"),
    ],
)
def test_data_that_does_not_fit_is_refused(start, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train_embedder(config_for(start, tmp_path, dry_run=True, **settings))


def test_stages_take_one_value_or_one_each(start, tmp_path):
    config = config_for(start, tmp_path, pairs=("a", "b"), epochs=(1, 2), num_negatives=(0, 7))
    stages = config.stages()
    assert [stage.epochs for stage in stages] == [1, 2]
    assert [stage.num_negatives for stage in stages] == [0, 7]
    assert [stage.batch_size for stage in stages] == [8, 8]
    assert all(stage.pairs.startswith("/") for stage in stages)


def test_flags_make_the_config():
    flags = ["--pairs=a,b", "--output=o", "--model=m", "--learning-rate=1e-4,2e-5", "--epochs=1,2"]
    config = parse(TrainEmbedderConfig, [*flags, "--dims=32,8", "--no-other-negatives"])
    assert config.pairs == ("a", "b")
    assert [stage.learning_rate for stage in config.stages()] == [1e-4, 2e-5]
    assert config.settings().loss.dims == (32, 8)
    assert not config.settings().loss.other_negatives
