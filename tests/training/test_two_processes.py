"""A reranker on two processes, replicated or sharded, has the gradients of one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qbatch.pipelines.train_reranker import TrainRerankerConfig
from qbatch.training.model_files import starting_model
from qbatch.training.networks import wrap
from qbatch.training.pairs import PairTable
from qbatch.training.world import World
from tests.processes import ROOT, free_port
from tests.training_pairs import write_pairs

NUM_ROWS = 6


def config_for(root: Path, **settings) -> TrainRerankerConfig:
    return TrainRerankerConfig(
        pairs=(str(root / "pairs.parquet"),),
        output=str(root / "out"),
        model=str(root / "start"),
        batch_size=(NUM_ROWS,),
        token_budget=400,
        **settings,
    )


def gradients(config: TrainRerankerConfig, start: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the averaged gradients of this process's share of all rows."""
    world = World.current()
    task = config.task("float32", 1)
    objective = config.settings().build(start, task, torch.device("cpu"))
    rows = np.arange(NUM_ROWS)[world.share(NUM_ROWS)]
    table = PairTable.open(config.pairs[0])
    batch = objective.read(table.take(rows), rows, num_negatives=3, seed=[0])
    network = wrap(objective.network, config.sharding, world)
    loss = objective.backward(network, batch, equal_passes=config.sharding == "fsdp")
    found = {}
    for name, parameter in objective.network.named_parameters():
        gradient = parameter.grad
        whole = gradient.full_tensor() if config.sharding == "fsdp" and world.size > 1 else gradient
        found[name] = whole.clone()
    return loss, found


def worker(root: str, sharding: str, rank: int, port: int) -> None:
    """One of two processes; the first writes what it found."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    folder = Path(root)
    loss, found = gradients(config_for(folder, sharding=sharding), folder / "start")
    if rank == 0:
        save_file(found | {"loss": torch.tensor(loss)}, folder / f"{sharding}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_get_the_gradients_of_one(tiny_start, tmp_path, sharding):
    write_pairs(tmp_path / "pairs.parquet", NUM_ROWS, num_negatives=3)
    (tmp_path / "start").mkdir()
    config = config_for(tmp_path)
    random_start = replace(config.start(), model=None, init_config=str(tiny_start))
    start = starting_model(random_start, "reranker", tmp_path / "start")
    code = "import sys; from tests.training.test_two_processes import worker; "
    code += "worker(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), sharding, str(rank), port], cwd=ROOT
        )
        for rank in range(2)
    ]
    assert [process.wait(240) for process in processes] == [0, 0]
    found = load_file(tmp_path / f"{sharding}.safetensors")
    loss, expected = gradients(config, start)
    assert found.pop("loss").item() == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
