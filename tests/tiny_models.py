"""Random models small enough to load in a second; real architecture code, real tokenizers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from qbatch.models.prompts import DEFAULT_INSTRUCTION
from qbatch.models.rerank_prompts import JUDGE_START, NO, YES

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_tiny_encoder(
    directory: Path, *, seed: int = 0, hidden_size: int = 32, **settings: float
) -> Path:
    """Write a one-layer BERT with mean pooling that knows single characters."""
    vocab = _write_tokenizer(directory, max_tokens=128)
    torch.manual_seed(seed)
    BertModel(_bert_config(vocab, hidden_size, **settings)).eval().save_pretrained(directory)
    write_modules(
        directory, {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    )
    _write_json(
        directory / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False}
    )
    return directory


def write_tiny_cross_encoder(directory: Path, *, seed: int = 0) -> Path:
    """Write a one-layer BERT classifier of pairs that knows single characters."""
    vocab = _write_tokenizer(directory, max_tokens=128)
    torch.manual_seed(seed)
    config = _bert_config(vocab, 32, num_labels=1, initializer_range=0.2)
    BertForSequenceClassification(config).eval().save_pretrained(directory)
    return directory


def write_tiny_judge(directory: Path, *, seed: int = 0) -> Path:
    """Write a one-layer Qwen3 with the answers yes and no as tokens, else single characters."""
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = _write_tokenizer(directory, max_tokens=1024, words=["yes", "no"], marks=marks)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).eval().save_pretrained(directory)
    return directory


def write_tiny_start(directory: Path, *, words: Sequence[str] = (), layers: int = 1) -> Path:
    """Write config and tokenizer of a small Qwen3, without weights: what training starts from.

    The tokenizer knows these words and those of the prompts, and else single characters.
    """
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    prompts = set(re.findall("[a-z]{2,}", (JUDGE_START + DEFAULT_INSTRUCTION).lower()))
    known = sorted(prompts | set(words) | {YES, NO, "instruct", "query", "document", "assistant"})
    vocab = _write_tokenizer(directory, max_tokens=256, words=known, marks=marks)
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
    ).save_pretrained(directory)
    return directory


def write_tiny_qwen3_embedder(directory: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write a one-layer Qwen3 embedder with the tokenizer of another directory."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    Qwen3Model(config).eval().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).symlink_to(tokenizer / name)
    return directory


def _bert_config(vocab_size: int, hidden_size: int, **settings: object) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        **settings,
    )


def _write_tokenizer(
    directory: Path, *, max_tokens: int, words: Sequence[str] = (), marks: Sequence[str] = ()
) -> int:
    """Write a tokenizer of single characters and some words; return the size of its vocabulary."""
    characters = [chr(c) for c in range(33, 127)]
    tokens = [*_SPECIAL, *characters, *("##" + c for c in characters), *words, *marks]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(marks))
    if not marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_tokens,
    ).save_pretrained(directory)
    return len(vocab)


def write_modules(path: Path, pooling: dict, names: tuple[str, ...] = ()) -> None:
    """Write the sentence-transformers files of a Transformer, a Pooling and further modules."""
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(("Transformer", "Pooling", *names))
    ]
    _write_json(path / "modules.json", modules)
    (path / "1_Pooling").mkdir(exist_ok=True)
    _write_json(path / "1_Pooling" / "config.json", pooling)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
