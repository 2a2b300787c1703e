"""The roofline counts what real models of the architectures hold and do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from qbatch.errors import ConfigError
from qbatch.models.loading import read_config
from qbatch.models.roofline import RooflineConfig, attention_flops, layer_weights, roofline
from tests.processes import ROOT
from tests.tiny_models import write_tiny_encoder, write_tiny_judge

LENGTH = 64


@pytest.fixture(params=["bert", "qwen3"])
def model_dir(request, tmp_path) -> Path:
    write = {"bert": write_tiny_encoder, "qwen3": write_tiny_judge}[request.param]
    return write(tmp_path / request.param)


def test_weights_and_flops_are_those_of_a_real_forward_pass(model_dir):
    shape = read_config(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    matrices = [w for layer in layers for w in layer.parameters() if w.ndim == 2]
    weights = layer_weights(shape) * shape.num_hidden_layers
    assert weights == sum(w.numel() for w in matrices)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layers_only = model(torch.ones(1, LENGTH, dtype=torch.long)).last_hidden_state
    assert layers_only.shape[1] == LENGTH
    causal_saving = 2 if shape.model_type == "qwen3" else 1  # eager attention computes all
    attention = attention_flops(shape, LENGTH) * causal_saving
    pooler = 2 * shape.hidden_size**2 if hasattr(model, "pooler") else 0
    counted = counter.get_total_flops() - pooler
    assert counted == pytest.approx(LENGTH * (2 * weights + attention), rel=0.01)


def test_a_faster_gpu_and_shorter_texts_give_more_tokens(model_dir):
    def predicted(**settings: object) -> int:
        return roofline(RooflineConfig(model=str(model_dir), **settings))["tokens_per_s_predicted"]

    assert predicted(gpu="h100") > predicted(gpu="l4")
    assert predicted(tokens_per_text=64) >= predicted(tokens_per_text=8000)
    assert predicted(efficiency=1.0) == pytest.approx(2 * predicted(efficiency=0.5), abs=2)


def test_cost_follows_from_the_price(model_dir):
    found = roofline(RooflineConfig(model=str(model_dir), gpu="a100", hourly_price=3.0))
    hours = 1e6 * 256 / found["tokens_per_s_predicted"] / 3600
    assert found["gpu_hours_per_million_texts"] == pytest.approx(hours, abs=1e-4)
    assert found["cost_per_million_texts"] == pytest.approx(3 * hours, abs=3e-4)


def test_an_unknown_gpu_is_refused(model_dir):
    with pytest.raises(ConfigError, match="gpu is 'tpu'; give one of l4"):
        roofline(RooflineConfig(model=str(model_dir), gpu="tpu"))


def test_the_command_prints_one_json_line(tmp_path):
    model = write_tiny_encoder(tmp_path / "model")
    command = [sys.executable, "-m", "qbatch", "roofline", "--model", str(model), "--gpu", "l4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert '"gpu": "l4"' in done.stdout.splitlines()[-1]
