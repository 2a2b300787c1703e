"""Model directories: tiny random weights beside real tokenizers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from tests import assets
from tests.tiny_models import write_modules

settings.register_profile("busy", deadline=None)  # machines that run tests are often busy
settings.load_profile("busy")

MakeQwen3 = Callable[..., Path]
MakeEncoder = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models gain nothing from threads, which wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_qwen3(tmp_path_factory: pytest.TempPathFactory) -> MakeQwen3:
    """Return a function that writes a tiny Qwen3 checkpoint; settings go to its config."""

    def make(*, with_head: bool = False, **settings) -> Path:
        torch.manual_seed(1)
        config = Qwen3Config(**(_QWEN3 | settings))
        model = Qwen3ForCausalLM(config) if with_head else Qwen3Model(config)
        # The pad token is also the end of every text: a released checkpoint has trained its row.
        model.get_input_embeddings().weight.data[config.pad_token_id].normal_(0, 0.2)
        path = tmp_path_factory.mktemp("qwen3")
        model.save_pretrained(path)
        return link_tokenizer(assets.qwen3_tokenizer(), path)

    return make


_QWEN3 = {
    "vocab_size": 151_669,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "pad_token_id": 151_643,
    "initializer_range": 0.2,  # at the usual 0.02 attention is so flat that errors in it vanish
}


@pytest.fixture(scope="session")
def qwen3_dir(make_qwen3: MakeQwen3) -> Path:
    return make_qwen3()


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    """Return a function that writes a tiny sentence-transformers encoder of the given class."""

    def make(model: PreTrainedModel, pooling: str) -> Path:
        path = tmp_path_factory.mktemp("encoder")
        model.save_pretrained(path)
        write_modules(path, {"pooling_mode": pooling})
        return link_tokenizer(assets.minilm(), path)

    return make


def tiny_encoder(cls: type[PreTrainedModel] = BertModel) -> PreTrainedModel:
    """Return random weights; XLM-R counts positions from its pad id."""
    torch.manual_seed(2)
    configs = {BertModel: BertConfig, XLMRobertaModel: XLMRobertaConfig}
    config = configs[cls](
        vocab_size=30_522,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        initializer_range=0.2,
    )
    return cls(config)


def link_tokenizer(tokenizer: Path, path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).symlink_to(tokenizer / name)
    return path
