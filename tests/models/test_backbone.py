"""Layers in fewer passes, the last for the tokens that are pooled, where that changes nothing."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from qbatch.models.backbone import Backbone

LENGTHS = np.array([9, 5, 5, 2])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def build(config_type: type, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a random model, the weights of its norms random too."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config_type(**SIZES, use_cache=False), dtype=dtype).eval()
    for name, weights in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weights, 0.5, 1.5)
    return model


@torch.inference_mode()
def stock_states(model: torch.nn.Module) -> torch.Tensor:
    """Return what transformers makes of each text of ``pack`` alone, one after the other."""
    ids, _, lengths = pack()
    texts = torch.split(ids, lengths.tolist())
    return torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in texts])


def tokens_of_last(model: torch.nn.Module, part: str) -> list[int]:
    """Return a list that will hold how many tokens each later call of a part of it gets."""
    seen: list[int] = []
    module = model.layers[-1].get_submodule(part)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


def pack() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    ids = torch.arange(int(LENGTHS.sum())) % 50
    return ids, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config_type", [Qwen3Config, Qwen2Config, LlamaConfig])
@torch.inference_mode()
def test_pooling_needs_of_the_last_layer_one_token_a_text(config_type, dtype):
    model = build(config_type, dtype)
    stock = stock_states(model)
    backbone = Backbone(model, "last")
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp")
    queries, keys, outputs, mlp = (tokens_of_last(model, part) for part in parts)
    pooled = backbone.pool(*pack())
    states, layout = backbone.states(*pack())
    assert queries == outputs == mlp == [len(LENGTHS), LENGTHS.sum()]
    assert keys == [LENGTHS.sum(), LENGTHS.sum()]
    tolerance = 2e-6 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(states, stock, atol=tolerance, rtol=tolerance)
    whole = states[layout.last_tokens].float()
    close = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(pooled, whole, atol=close, rtol=close)
    expected = stock[layout.last_tokens].float()
    torch.testing.assert_close(pooled, expected, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_segments_that_continue_others_end_early_too():
    backbone = Backbone(build(Qwen3Config), "last")
    ids, positions, _ = pack()
    parents = np.array([-1, 0, 0, 1])
    positions = torch.cat(
        [torch.arange(9), torch.arange(9, 14), torch.arange(9, 14), torch.arange(14, 16)]
    )
    pooled = backbone.pool(ids, positions, LENGTHS, parents=parents)
    states, layout = backbone.states(ids, positions, LENGTHS, parents=parents)
    torch.testing.assert_close(pooled, states[layout.last_tokens], atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_layers_of_another_shape_are_computed_whole():
    """Gemma 2 normalises after each part as well: our short form would be wrong."""
    model = build(Gemma2Config)
    own = [layer.forward for layer in model.layers]
    backbone = Backbone(model, "last")
    seen = tokens_of_last(model, "mlp")
    pooled = backbone.pool(*pack())
    assert all(count > len(LENGTHS) for count in seen)
    assert [layer.forward for layer in model.layers] == own
    assert torch.isfinite(pooled).all()


def test_training_through_the_short_layer_gives_the_same_gradients():
    model = build(Qwen3Config)
    backbone = Backbone(model, "last")
    states, layout = backbone.states(*pack())
    states[layout.last_tokens].square().sum().backward()
    expected = [weights.grad.clone() for weights in model.parameters()]
    model.zero_grad()
    backbone.pool(*pack()).square().sum().backward()
    for weights, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weights.grad, gradient, atol=1e-4, rtol=1e-4)
