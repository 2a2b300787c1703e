import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from qbatch.errors import ConfigError
from qbatch.models.tokenization import TextTokenizer
from tests import assets

END = 151_643


@pytest.fixture(scope="session")
def tokenizer(qwen3_dir: Path) -> TextTokenizer:
    return TextTokenizer.load(qwen3_dir, 16)


@pytest.fixture(scope="session")
def bert_tokenizer() -> TextTokenizer:
    return TextTokenizer.load(assets.minilm(), 16)


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode([text]).ids.tolist()


@pytest.mark.parametrize(
    "text", ["", "test", "x " * 500, "end<|endoftext|>", "<|im_end|>", "日本 ∂"]
)
def test_qwen3_ends_with_endoftext_exactly_once(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert ids[-1] == END
    assert ids.count(END) == 1
    assert len(ids) <= 16


def test_known_ids(tokenizer):
    assert ids_of(tokenizer, "test again") == [1944, 1549, END]
    assert ids_of(tokenizer, "") == [END]


def test_truncation_cuts_the_text_and_not_the_end(tokenizer):
    words = "one two three four five six seven eight nine ten " * 3
    full = tokenizer.backend.encode(words).ids
    assert ids_of(tokenizer, words) == [*full[:15], END]


def test_a_tokenizer_that_appends_by_itself_is_left_alone(qwen3_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(qwen3_dir, path)
    released = Tokenizer.from_file(str(path / "tokenizer.json"))
    released.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)]
    )
    released.save(str(path / "tokenizer.json"))
    tokenizer = TextTokenizer.load(path, 8)
    assert ids_of(tokenizer, "test again") == [1944, 1549, END]
    assert ids_of(tokenizer, "x " * 50)[-2:] == [856, END]
    assert tokenizer.num_special == 1


def test_special_tokens_in_a_text_are_text(tokenizer, bert_tokenizer):
    ids = ids_of(tokenizer, "a<|im_end|><|endoftext|>b")
    assert all(token < END for token in ids[:-1])
    assert tokenizer.backend.decode(ids[:-1]) == "a<|im_end|><|endoftext|>b"
    assert ids_of(bert_tokenizer, "[SEP]") == [101, 1031, 19802, 1033, 102]


def test_tokens_without_a_row_become_text(make_qwen3):
    # Qwen3-Embedding 4B and 8B have 151,665 rows; <think> is 151667.
    full = TextTokenizer.load(make_qwen3(), 16)
    cut = TextTokenizer.load(make_qwen3(vocab_size=151_665), 16)
    assert ids_of(full, "<think>")[0] == 151_667
    ids = ids_of(cut, "<think>")
    assert max(ids) == END
    assert cut.backend.decode(ids[:-1]) == "<think>"
    assert ids_of(cut, "<tool_call>")[0] == 151_657


def test_a_tokenizer_of_another_model_is_refused(make_qwen3):
    with pytest.raises(ConfigError, match="has the id 151642, the embedding table has 1000 rows"):
        TextTokenizer.load(make_qwen3(vocab_size=1000, pad_token_id=0))


def test_bert_keeps_its_own_template(bert_tokenizer):
    batch = bert_tokenizer.encode(["", "hello", "word " * 99])
    assert batch.lengths.tolist() == [2, 3, 16]
    assert batch.ids.tolist() == [101, 102, 101, 7592, 102, 101, *[2773] * 14, 102]
    assert bert_tokenizer.num_special == 2


def test_counts_are_of_the_bare_text_before_truncation(tokenizer):
    assert tokenizer.count(["", "test again", "x " * 500]).tolist() == [0, 2, 501]


def test_a_batch_is_its_texts_one_after_the_other(tokenizer):
    texts = [f"text number {i} " * (i % 7) for i in range(3000)]  # more than one inner batch
    batch = tokenizer.encode(texts)
    parts = np.split(batch.ids, np.cumsum(batch.lengths)[:-1])
    assert (batch.ids.dtype, batch.lengths.dtype) == (np.int32, np.int32)
    assert all(parts[i].tolist() == ids_of(tokenizer, texts[i]) for i in range(0, 3000, 97))


def test_no_texts_give_empty_arrays(tokenizer):
    batch = tokenizer.encode([])
    assert (batch.ids.shape, batch.lengths.shape) == ((0,), (0,))
    assert (batch.ids.dtype, batch.lengths.dtype) == (np.int32, np.int32)
    assert tokenizer.count([]).shape == (0,)


@pytest.mark.parametrize("max_tokens", [1, 32_769])
def test_a_limit_that_leaves_no_text_or_exceeds_the_model_is_refused(qwen3_dir, max_tokens):
    with pytest.raises(ConfigError, match=f"out of range: {max_tokens}; .* takes 2 to 32768"):
        TextTokenizer.load(qwen3_dir, max_tokens)
