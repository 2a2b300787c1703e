"""Random models small enough to load in a second; real architecture code, real tokenizers."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_tiny_encoder(directory: Path, *, seed: int = 0, hidden_size: int = 32) -> Path:
    """Write a one-layer BERT with mean pooling that knows single characters."""
    characters = [chr(c) for c in range(33, 127)]
    vocab = {t: i for i, t in enumerate([*_SPECIAL, *characters, *("##" + c for c in characters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    ).save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).eval().save_pretrained(directory)
    _write_json(directory / "modules.json", [_module(0, "", "Transformer"), _pooling_module()])
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    _write_json(directory / "1_Pooling" / "config.json", pooling)
    _write_json(
        directory / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False}
    )
    return directory


def _pooling_module() -> dict:
    return _module(1, "1_Pooling", "Pooling")


def _module(i: int, path: str, kind: str) -> dict:
    return {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
