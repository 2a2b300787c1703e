"""Passages against their laws, with the tokenizers of Qwen3 and MiniLM."""

# ruff: noqa: RUF001 - texts in many scripts

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from qbatch import schema
from qbatch.corpus.passages import content_hashes, split_and_tokenize
from qbatch.errors import ConfigError
from tests import assets

TOKENIZERS = ("qwen3", "minilm")

SENTENCES = {
    "english": "The cat sat on the mat, as cats do. It cost $3.50 (or so)! Why? ",
    "german": "Die Größe ändert sich z.B. im Winter. Übermäßig schön! ",
    "chinese": "今天天气很好，我们去公园散步。你觉得怎么样？“好的！”",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか見当がつかぬ。",
    "thai": "ฉันชอบกินข้าวผัดกระเพราไก่ไข่ดาว วันนี้อากาศร้อนมาก ",
    "arabic": "القط يجلس على السجادة. هل تحب القراءة؟ نعم، كثيرا! ",
    "hindi": "बिल्ली चटाई पर बैठी है। क्या आपको पढ़ना पसंद है? हाँ। ",
    "korean": "고양이가 매트 위에 앉아 있다. 날씨가 좋네요! ",
    "amharic": "ድመቷ ምንጣፉ ላይ ተቀምጣለች። ጥሩ ነው። ",
    "emoji": "👨‍👩‍👧‍👦🇩🇪🇫🇷👍🏽❤️‍🔥",
    "marks": "e\u0301a\u0308n\u0303o\u0302u\u0308 ",
    "code": "for (i = 0; i < n; ++i) {\n\tx[i] += 1;\n}\n\n",
    "runs": "....!!!!----          \t\n\r\n\u2029",
}

texts = st.lists(st.sampled_from(list(SENTENCES.values())) | st.text(max_size=12), max_size=12).map(
    "".join
)
titles = st.none() | st.just("") | st.text(max_size=60) | st.sampled_from(list(SENTENCES.values()))


class FileTokenizer:
    """A tokenizer.json as passages want it; remembers the largest call."""

    def __init__(self, name: str, max_tokens: int):
        self.max_tokens = max_tokens
        self.backend, self.complete, self._truncating = (_load(name) for _ in range(3))
        self._truncating.enable_truncation(max_tokens)
        self.largest_call = 0

    def encode(self, texts: Sequence[str]):
        self.largest_call = max(self.largest_call, sum(map(len, texts)))
        encodings = self._truncating.encode_batch(texts)
        ids = [i for encoding in encodings for i in encoding.ids]
        return SimpleNamespace(
            ids=np.array(ids, np.int32), lengths=np.array([len(e) for e in encodings], np.int32)
        )


def _load(name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(_tokenizer_json(name))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if name == "qwen3":
        end = ("<|endoftext|>", 151643)
        tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return tokenizer


@cache
def _tokenizer_json(name: str) -> str:
    folder = assets.qwen3_tokenizer() if name == "qwen3" else assets.minilm()
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


@cache
def tokenizer_of(name: str, max_tokens: int) -> FileTokenizer:
    return FileTokenizer(name, max_tokens)


def documents_of(*texts: str, titles: Sequence[str | None] | None = None) -> pa.Table:
    columns = [
        pa.array(["corpus.jsonl"] * len(texts)).dictionary_encode(),
        range(len(texts)),
        [f"d{i}" for i in range(len(texts))],
        titles or [None] * len(texts),
        texts,
    ]
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, schema.DOCUMENTS, strict=True)],
        schema.DOCUMENTS,
    )


def split(tokenizer, documents, overlap_tokens=0, prompt="", max_tokens=None) -> list[dict]:
    return split_and_tokenize(
        documents,
        tokenizer,
        max_tokens=max_tokens or tokenizer.max_tokens,
        overlap_tokens=overlap_tokens,
        prompt=prompt,
    ).to_pylist()


def passage_texts(passages: list[dict], text: str) -> list[str]:
    return [text[p["start_char"] : p["end_char"]] for p in passages]


def covered(passages: list[dict], length: int) -> np.ndarray:
    is_covered = np.zeros(length, bool)
    for passage in passages:
        is_covered[passage["start_char"] : passage["end_char"]] = True
    return is_covered


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=texts, overlap_tokens=st.integers(0, 11), max_tokens=st.sampled_from([24, 40]))
def test_passages_are_complete_and_lose_no_character(name, text, overlap_tokens, max_tokens):
    tokenizer = tokenizer_of(name, max_tokens)
    passages = split(tokenizer, documents_of(text), overlap_tokens)
    for passage, piece in zip(passages, passage_texts(passages, text), strict=True):
        assert passage["token_ids"] == tokenizer.complete.encode(piece).ids
        assert passage["num_tokens"] == len(passage["token_ids"]) <= max_tokens
    assert all(text[i].isspace() for i in np.flatnonzero(~covered(passages, len(text))))
    starts = [p["start_char"] for p in passages]
    assert starts == sorted(set(starts))
    if len(tokenizer.complete.encode(text)) <= max_tokens:
        assert [(p["start_char"], p["end_char"]) for p in passages] == [(0, len(text))]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=texts, title=titles)
def test_every_passage_carries_title_and_prompt(name, text, title):
    tokenizer = tokenizer_of(name, 40)
    passages = split(tokenizer, documents_of(text, titles=[title]), prompt="passage: ")
    whole = "passage: " + " ".join(part for part in (title, text) if part)
    if len(passages) == 1 and len(tokenizer.complete.encode(whole)) <= 40:
        assert passages[0]["token_ids"] == tokenizer.complete.encode(whole).ids
    for passage, piece in zip(passages, passage_texts(passages, text), strict=True):
        assert passage["num_tokens"] <= 40
        inputs = (f"passage: {title[:n]} {piece}" for n in range(1, len(title or "") + 1))
        alone = f"passage: {piece or title or ''}"  # without a text, no space follows the title
        ids = (tokenizer.complete.encode(t).ids for t in (*inputs, alone))
        assert passage["token_ids"] in ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_title_is_cut_at_half_of_the_room(name):
    tokenizer = tokenizer_of(name, 40)
    title, text = "very " * 200 + "long", "A short sentence stands here. " * 30
    passages = split(tokenizer, documents_of(text, titles=[title]))
    text_tokens = [
        len(tokenizer.backend.encode(piece, add_special_tokens=False))
        for piece in passage_texts(passages, text)
    ]
    assert all(12 <= n <= 20 for n in text_tokens[:-1])
    assert all(p["num_tokens"] <= 40 for p in passages)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("script", [s for s in SENTENCES if s not in {"runs", "code"}])
def test_cuts_in_every_script_keep_graphemes_whole(name, script):
    text = SENTENCES[script].strip() * 30
    passages = split(tokenizer_of(name, 64), documents_of(text), overlap_tokens=9)
    borders = {0, *(m.end() for m in regex.finditer(r"\X", text))}
    assert all(p["start_char"] in borders and p["end_char"] in borders for p in passages)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "sentences",
    [
        "The cat sat on the mat.| It cost 3.50 dollars (or so)!| Was it 'worth it?'| Yes...| ",
        "今天天气很好，我们去公园。|你觉得怎么样？|她说：“好的！”|然后我们走了。|",
        "बिल्ली चटाई पर बैठी है।| क्या वह सोती है?| ",
        "القط يجلس على السجادة.| هل تحب القراءة؟| ",
        "ድመቷ ምንጣፉ ላይ።| ጥሩ ነው።| ",
    ],
)
def test_short_sentences_are_never_cut(name, sentences):
    parts = sentences.split("|") * 40
    ends = {len("".join(parts[: i + 1]).rstrip()) for i in range(len(parts))}
    text = "".join(parts)
    passages = split(tokenizer_of(name, 128), documents_of(text))
    assert len(passages) > 1
    assert {p["end_char"] for p in passages} <= ends


def test_paragraphs_go_before_sentences():
    paragraph = "One sentence is here. Another one follows it."
    text = "\n\n".join([paragraph] * 20)
    passages = split(tokenizer_of("qwen3", 64), documents_of(text))
    assert len(passages) > 1
    assert all(piece.endswith("follows it.") for piece in passage_texts(passages, text))
    assert all(piece.startswith("One sentence") for piece in passage_texts(passages, text))


def test_last_passage_is_not_a_leftover():
    tokenizer = tokenizer_of("qwen3", 64)
    text = " ".join(["word"] * 65)
    lengths = [p["num_tokens"] for p in split(tokenizer, documents_of(text))]
    assert len(lengths) == 2
    assert min(lengths) > 16


def test_overlap_repeats_whole_sentences_within_its_limit():
    tokenizer = tokenizer_of("qwen3", 64)
    text = " ".join(f"This is sentence number {i} of many." for i in range(60))
    passages = split(tokenizer, documents_of(text), overlap_tokens=24)
    for before, after in pairwise(passages):
        repeated = text[after["start_char"] : before["end_char"]]
        assert repeated.startswith("This is sentence")
        assert 0 < len(tokenizer.backend.encode(repeated, add_special_tokens=False)) <= 24


def test_many_documents_at_once_equal_one_at_a_time():
    tokenizer = tokenizer_of("minilm", 32)
    contents = [s * n for n in (1, 3, 0, 9) for s in SENTENCES.values()]
    expected = [p for text in contents for p in split(tokenizer, documents_of(text))]
    found = split(tokenizer, documents_of(*contents))
    where = ("start_char", "end_char", "passage_index", "token_ids", "content_hash")
    assert [[p[c] for c in where] for p in found] == [[p[c] for c in where] for p in expected]
    assert [p["row"] for p in found] == sorted(p["row"] for p in found)
    assert {p["row"] for p in found} == set(range(len(contents)))


def test_identity_and_kept_columns_are_repeated_for_every_passage():
    documents = documents_of("short", "A long sentence. " * 40, "short too")
    documents = documents.append_column("year", pa.array([2001, None, 2003]))
    table = split_and_tokenize(
        documents, tokenizer_of("qwen3", 64), max_tokens=64, overlap_tokens=0
    )
    assert table.schema == pa.schema([*schema.PASSAGES, pa.field("year", pa.int64())])
    passages = table.to_pylist()
    assert [p["doc_id"] for p in passages] == ["d0", *["d1"] * (len(passages) - 2), "d2"]
    assert [p["year"] for p in passages] == [2001, *[None] * (len(passages) - 2), 2003]
    middle = passages[1:-1]
    assert [p["passage_id"] for p in middle] == [f"d1#{i}" for i in range(len(middle))]
    assert [p["passage_index"] for p in middle] == list(range(len(middle)))
    assert len({p["content_hash"] for p in middle}) == 1


def test_content_hash_tells_title_from_text():
    documents = documents_of("b", "b", "ab", "", titles=["a", None, "", "ab"])
    expected = [b"a\0b", b"\0b", b"\0ab", b"ab\0"]
    hashes = content_hashes(documents["title"], documents["text"]).to_pylist()
    assert hashes == [hashlib.blake2b(e, digest_size=16).digest() for e in expected]
    sliced = documents.slice(1, 2)
    assert content_hashes(sliced["title"], sliced["text"]).to_pylist() == hashes[1:3]


def test_no_documents_give_no_passages():
    empty = schema.DOCUMENTS.empty_table()
    table = split_and_tokenize(empty, tokenizer_of("qwen3", 64), max_tokens=64, overlap_tokens=0)
    assert table.schema == schema.PASSAGES
    assert len(table) == 0


@pytest.mark.parametrize("text", ["", " ", "\n" * 5_000, "\x00" * 5_000])
def test_text_without_content_still_gives_one_passage(text):
    assert len(split(tokenizer_of("minilm", 32), documents_of(text))) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", [".", "! ", "\n", " ", "a", "。", '."', "e\u0301", "\u0301", "🇩🇪"])
def test_huge_monotonous_text_takes_linear_time(unit):
    text = (unit * 200_000)[:200_000]
    passages = split(tokenizer_of("qwen3", 512), documents_of(text))
    assert all(text[i].isspace() for i in np.flatnonzero(~covered(passages, len(text))))


def test_tokenizer_is_never_handed_a_huge_text_at_once():
    tokenizer = FileTokenizer("minilm", 256)
    text = "All work and no play makes Jack a dull boy. " * 120_000
    passages = split(tokenizer, documents_of(text), max_tokens=256)
    assert tokenizer.largest_call <= 1 << 22
    assert covered(passages, len(text)).sum() >= len(text) - len(passages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 65, "overlap_tokens": 0}, r"max_tokens \(65\) is above .* \(64\)"),
        ({"max_tokens": 8, "overlap_tokens": 0}, r"leaves room for 7 tokens .* at least 8"),
        ({"max_tokens": 64, "overlap_tokens": 32}, r"overlap_tokens \(32\) .* half of max_tokens"),
        ({"max_tokens": 64, "overlap_tokens": -1}, r"overlap_tokens \(-1\)"),
        ({"max_tokens": 9, "overlap_tokens": 0, "prompt": "passage: "}, "shorten the prompt"),
    ],
)
def test_impossible_limits_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        split_and_tokenize(documents_of("text"), tokenizer_of("qwen3", 64), **settings)


@pytest.mark.parametrize("text", ["", "  \n "])
@pytest.mark.parametrize("title", ["short", "a very long title " * 50])
def test_a_blank_text_with_a_title_is_one_passage(text, title):
    passages = split(tokenizer_of("minilm", 32), documents_of(text, titles=[title]))
    assert len(passages) == 1
    assert 2 < passages[0]["num_tokens"] <= 32
    assert (passages[0]["start_char"], passages[0]["end_char"]) == (0, len(text))
