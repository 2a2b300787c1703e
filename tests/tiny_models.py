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
    write_modules(
        directory, {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    )
    _write_json(
        directory / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False}
    )
    return directory


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
