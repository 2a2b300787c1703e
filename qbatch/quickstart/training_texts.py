"""Training pairs and evaluation sets for the bundled models, out of Debian and WordNet.

    python -m qbatch.quickstart.training_texts --output training-texts

writes pairs (``pairs/``, ``reranking/``), the described packages as a corpus to mine negatives from
(``corpus/``), what training starts from (``start/``: a bag of words and a tokenizer made of these
texts) and two evaluation sets in the layout of BEIR (``evaluation/``).

Held out are packages whose name has a first SHA-256 byte below 0x10, all other packages of the same
sources, and every translation of both: nothing of them is in the pairs or in the tokenizer.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from qbatch.errors import StorageError
from qbatch.quickstart import assets
from qbatch.quickstart.bundled import read_jsonl
from qbatch.quickstart.starting_point import write_start

T = TypeVar("T")

HELD_OUT = 0x10
"""First bytes of the SHA-256 of a package's name below it are never trained on."""

_MIN_CHARACTERS = 100
"""Shorter descriptions say little that their synopsis does not."""

_CUT_CHARACTERS = 400
"""Longer descriptions end there, for all models."""

_READ_CHARACTERS = 800
"""Of a description, where sentences are drawn from."""

_MIN_SENTENCE = 30
"""Shorter ones are headings and marks of lists."""

_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|\n\n")

_LANGUAGES = {"de": 20_000, "fr": 8000, "it": 8000, "es": 8000, "ja": 4000, "ru": 4000}
"""Most translated descriptions of each language."""

_NUM_MEANINGS = 30_000
"""Of WordNet's, drawn at random: more would outweigh the descriptions."""

_NUM_RERANKING = {"retrieval/descriptions": 5000, "retrieval/translations": 2500}
"""Pairs from which the reranker learns: each costs as much as a text and its candidates."""

_NUM_DOCUMENTS, _NUM_QUERIES = 1500, 300


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and the document that answers it."""

    query: str
    document: str
    doc_id: str
    task: str


@dataclass(frozen=True, slots=True)
class Descriptions:
    """Package descriptions on one side of the hold-out rule, one for each text and language."""

    english: Mapping[str, Mapping[str, str]]
    """By md5."""
    translated: Mapping[str, Sequence[Mapping[str, str]]]
    """By language."""


def is_held_out(name: str) -> bool:
    """Return whether a package is one that no bundled model was trained on."""
    return hashlib.sha256(name.encode()).digest()[0] < HELD_OUT


def split_descriptions(rows: Sequence[Mapping[str, str]]) -> tuple[Descriptions, Descriptions]:
    """Return what is trained on, and what is held out."""
    sources = {row["source"] for row in rows if is_held_out(row["package"])}
    md5s = {_md5(row) for row in rows if row["source"] in sources or is_held_out(row["package"])}
    parts = [row for row in rows if _md5(row) not in md5s], [r for r in rows if _md5(r) in md5s]
    return _describe(parts[0]), _describe(parts[1])


def _md5(row: Mapping[str, str]) -> str:
    """Return what names the English original, which translations share."""
    return row["id"].split(":")[-2]


def _describe(rows: Iterable[Mapping[str, str]]) -> Descriptions:
    english: dict[str, Mapping[str, str]] = {}
    translated: dict[str, dict[str, Mapping[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["lang"] == "en":
            english.setdefault(_md5(row), row)
        else:
            translated[row["lang"]].setdefault(_md5(row), row)
    english = {key: row for key, row in english.items() if len(row["body"]) > _MIN_CHARACTERS}
    return Descriptions(english, {lang: list(found.values()) for lang, found in translated.items()})


def description_pairs(descriptions: Descriptions) -> Iterator[Pair]:
    """Yield English synopses with their descriptions."""
    for md5, row in descriptions.english.items():
        yield Pair(row["synopsis"], row["body"][:_CUT_CHARACTERS], md5, "description")


def passage_pairs(descriptions: Descriptions, rng: random.Random) -> Iterator[Pair]:
    """Yield a sentence of a description with what stands around it (Lee et al., arXiv 1906.00300).

    Descriptions of one sentence yield nothing.
    """
    for md5, row in descriptions.english.items():
        sentences = _SENTENCE_END.split(row["body"][:_READ_CHARACTERS])
        chosen = rng.randrange(len(sentences))
        rest = " ".join(sentences[:chosen] + sentences[chosen + 1 :])
        if min(len(sentences[chosen]), len(rest)) >= _MIN_SENTENCE:
            yield Pair(sentences[chosen], rest[:_CUT_CHARACTERS], md5, "passage")


def body_translation_pairs(descriptions: Descriptions, rng: random.Random) -> Iterator[Pair]:
    """Yield beginnings of descriptions in other languages with the English description."""
    for lang, row, original in _translations(descriptions, rng):
        beginning = row["body"][: _READ_CHARACTERS // 4]
        if len(beginning) >= _MIN_SENTENCE:
            yield Pair(beginning, original["body"][:_CUT_CHARACTERS], _md5(row), f"{lang}-body")


def translation_pairs(descriptions: Descriptions, rng: random.Random) -> Iterator[Pair]:
    """Yield synopses in other languages with the English description."""
    for lang, row, original in _translations(descriptions, rng):
        yield Pair(row["synopsis"], original["body"][:_CUT_CHARACTERS], _md5(row), lang)


def synopsis_pairs(descriptions: Descriptions, rng: random.Random) -> Iterator[Pair]:
    """Yield synopses in other languages with the English synopsis."""
    for lang, row, original in _translations(descriptions, rng):
        yield Pair(row["synopsis"], original["synopsis"], _md5(row), f"{lang}-synopsis")


def _translations(
    descriptions: Descriptions, rng: random.Random
) -> Iterator[tuple[str, Mapping[str, str], Mapping[str, str]]]:
    """Yield language, translated and English row of some packages."""
    for lang, most in _LANGUAGES.items():
        rows = [r for r in descriptions.translated.get(lang, ()) if _md5(r) in descriptions.english]
        for row in _sample(rng, rows, most):
            yield lang, row, descriptions.english[_md5(row)]


def _sample(rng: random.Random, rows: Sequence[T], most: int) -> list[T]:
    return rng.sample(rows, min(most, len(rows)))


def wordnet_pairs(meanings: Iterable[Mapping[str, Any]], rng: random.Random) -> Iterator[Pair]:
    """Yield of each meaning one pair: word and definition, the reverse, or an example and both."""
    for row in meanings:
        definition, words = row["definition"], ", ".join(row["words"])
        pairs = [
            Pair(words, definition, row["id"], "word"),
            Pair(definition, words, row["id"], "definition"),
        ]
        for example in row["examples"]:
            pairs.append(Pair(example, f"{words}\n\n{definition}", row["id"], "example"))
        yield rng.choice(pairs)


def write_pairs(path: Path, pairs: Iterable[Pair], rng: random.Random) -> None:
    """Write a pairs table in random order."""
    rows = list(pairs)
    rng.shuffle(rows)
    columns = {
        "query": [pair.query for pair in rows],
        "document": [pair.document for pair in rows],
        "doc_id": [pair.doc_id for pair in rows],
        "task": [pair.task for pair in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=50_000)


def write_evaluation(folder: Path, held_out: Descriptions, rng: random.Random) -> None:
    """Write the sets ``english`` and ``german``: synopses among 1,500 English descriptions.

    The English descriptions with a German translation come first, so that both sets can ask about
    the same documents.
    """
    german = {_md5(row): row["synopsis"] for row in held_out.translated.get("de", ())}
    names = sorted(held_out.english, key=lambda md5: (md5 not in german, rng.random()))
    chosen = names[:_NUM_DOCUMENTS]
    documents = {md5: held_out.english[md5]["body"][:_CUT_CHARACTERS] for md5 in chosen}
    asked = [md5 for md5 in chosen if md5 in german][:_NUM_QUERIES]
    english = rng.sample(chosen, _NUM_QUERIES)
    _write_set(folder / "english", documents, {m: held_out.english[m]["synopsis"] for m in english})
    _write_set(folder / "german", documents, {m: german[m] for m in asked})


def _write_set(folder: Path, documents: Mapping[str, str], queries: Mapping[str, str]) -> None:
    """Write a set; ids of queries differ from those of documents, since BEIR skips equal ones."""
    (folder / "qrels").mkdir(parents=True)
    _write_lines(folder / "corpus.jsonl", [{"_id": d, "text": t} for d, t in documents.items()])
    asked = [{"_id": f"q-{name}", "text": text} for name, text in queries.items()]
    _write_lines(folder / "queries.jsonl", asked)
    lines = ["query-id\tcorpus-id\tscore", *(f"q-{name}\t{name}\t1" for name in queries)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")


def write_all(output: Path, *, seed: int = 0) -> dict[str, int]:
    """Write pairs, start and evaluation sets; return the number of pairs of each table."""
    rng = random.Random(seed)
    trained, held_out = split_descriptions(read_jsonl(assets.fetch_debian_descriptions()))
    meanings = read_jsonl(assets.fetch_wordnet())
    tables = {
        "retrieval/descriptions": list(description_pairs(trained)),
        "retrieval/translations": list(translation_pairs(trained, rng)),
        "retrieval/passages": list(passage_pairs(trained, rng)),
        "retrieval/bodies": list(body_translation_pairs(trained, rng)),
        "words/synopses": list(synopsis_pairs(trained, rng)),
        "words/wordnet": list(wordnet_pairs(rng.sample(meanings, _NUM_MEANINGS), rng)),
    }
    (output / "corpus").mkdir(parents=True)
    documents = {pair.doc_id: pair.document for pair in tables["retrieval/descriptions"]}
    rows = ({"doc_id": doc_id, "text": text} for doc_id, text in documents.items())
    _write_lines(output / "corpus" / "descriptions.jsonl", rows)
    for name, table in tables.items():
        write_pairs(output / "pairs" / f"{name}.parquet", table, rng)
    write_evaluation(output / "evaluation", held_out, rng)
    sample = [p for name, most in _NUM_RERANKING.items() for p in _sample(rng, tables[name], most)]
    write_pairs(output / "reranking" / "pairs.parquet", sample, rng)
    pairs = [pair for table in tables.values() for pair in table]
    write_start(output / "start", [p.query for p in pairs], [p.document for p in pairs])
    return {name: len(table) for name, table in tables.items()}


def main() -> int:
    """Write everything that training of the bundled models starts from."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.training_texts")
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist yet")
    try:
        print(json.dumps(write_all(parser.parse_args().output)))  # noqa: T201 - its output
    except StorageError as e:
        print(f"qbatch: {e}", file=sys.stderr)  # noqa: T201 - likewise
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
