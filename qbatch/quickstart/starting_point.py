"""What the bundled models start from: small Qwen3 and a tokenizer of their own.

    python -m qbatch.quickstart.starting_point --embedder DIR --output DIR

writes what the reranker starts from, which needs the trained embedder; where that starts is written
by ``qbatch.quickstart.training_texts``.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from qbatch.models.prompts import qwen3_query_prompt
from qbatch.models.rerank_prompts import JUDGE_END, JUDGE_START, NO, YES, judge_opening
from qbatch.models.tokenization import QWEN3_END
from qbatch.training.starting_embedder import write_bag_of_words
from qbatch.training.starting_reranker import write_matcher

VOCABULARY = 16_384

INSTRUCTION = "Find what is meant"
"""Task sentence of the bundled models; few tokens, since every query begins with it."""

_SPECIAL = (QWEN3_END, "<|im_start|>", "<|im_end|>", "<think>", "</think>")

_SPLIT = r"[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}]"
"""Words, digits and signs, without the space between. Unlike in Qwen's own pattern, a word is the
same token whatever stands before it, so token vectors match equal words before any training."""

CONFIG = {
    "architectures": ["Qwen3Model"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "attention_dropout": 0.0,
    "attention_bias": False,
    "use_cache": True,
    "dtype": "float32",
}


def write_start(folder: Path, queries: Sequence[str], documents: Sequence[str]) -> None:
    """Write a model that finds equal words, and a byte-level BPE tokenizer that folds case."""
    texts = [*map(query_text, queries), *documents]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    make_tokenizer(texts).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": QWEN3_END,
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    write_bag_of_words(folder, texts)


def query_text(query: str) -> str:
    """Return a query with the prompt of the bundled embedder."""
    return qwen3_query_prompt(INSTRUCTION) + query


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of ``VOCABULARY`` ids that has the prompts' words as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(_with_prompts(texts), trainer)
    return tokenizer


def _with_prompts(texts: Iterable[str]) -> Iterable[str]:
    """Yield the texts, and so often the prompts that their words become tokens."""
    prompts = (JUDGE_START, judge_opening(), JUDGE_END, query_text(""))
    yield from prompts * 200
    yield from (YES, NO) * 200
    yield from texts


def main() -> None:
    """Write what the reranker starts from."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.starting_point")
    parser.add_argument("--embedder", type=Path, required=True, help="the trained one")
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist yet")
    options = parser.parse_args()
    write_matcher(options.embedder, options.output)


if __name__ == "__main__":
    main()
