"""What the bundled models are trained on: nothing held out, and a tokenizer for the prompts."""

import json
import random
import re

from qbatch.models.rerank_prompts import JUDGE_END, NO, YES
from qbatch.models.rerank_templates import pair_template
from qbatch.models.tokenization import QWEN3_END
from qbatch.quickstart.starting_point import VOCABULARY, make_tokenizer
from qbatch.quickstart.training_texts import (
    body_translation_pairs,
    description_pairs,
    is_held_out,
    passage_pairs,
    split_descriptions,
    synopsis_pairs,
    translation_pairs,
    wordnet_pairs,
    write_evaluation,
    write_pairs,
)
from qbatch.training.pairs import PairTable

NAMES = [f"package{i}" for i in range(400)]
HELD_OUT = next(name for name in NAMES if is_held_out(name))
TRAINED = next(name for name in NAMES if not is_held_out(name))
SENTENCES = (
    "A server that answers requests for pages. "
    "It reads its settings from one file at start. "
    "Modules add what it cannot do by itself."
)
BODY = "A tool that does one thing and does it well, as its authors say in many words. " * 2


def description(package, *, source=None, lang="en", md5=None, synopsis="a tool"):
    return {
        "id": f"{package}:{md5 or package}:{lang}",
        "package": package,
        "source": source or package,
        "synopsis": f"{synopsis} {package} {lang}",
        "body": BODY,
        "lang": lang,
    }


def test_about_one_package_in_sixteen_is_held_out():
    assert 10 <= sum(map(is_held_out, NAMES)) <= 40


def test_relatives_and_translations_are_held_out_too():
    rows = [
        description(HELD_OUT, source="family"),
        description(TRAINED, source="family"),
        description(TRAINED, source="family", lang="de"),
        description("elsewhere", lang="fr", md5=HELD_OUT),
        description("package1", md5="own"),
        description("package1", md5="own", lang="de"),
    ]
    assert not is_held_out("package1")
    trained, held_out = split_descriptions(rows)
    assert list(trained.english) == ["own"]
    assert [row["package"] for row in trained.translated["de"]] == ["package1"]
    assert set(held_out.english) == {HELD_OUT, TRAINED}
    assert {lang: len(found) for lang, found in held_out.translated.items()} == {"de": 1, "fr": 1}


def test_pairs_name_their_document_and_their_task():
    rows = [description("package1"), description("package1", lang="de")]
    trained, _ = split_descriptions(rows)
    (pair,) = description_pairs(trained)
    (translated,) = translation_pairs(trained, random.Random(0))
    (short,) = synopsis_pairs(trained, random.Random(0))
    assert (pair.query, pair.document, pair.task) == ("a tool package1 en", BODY, "description")
    assert (translated.query, translated.document) == ("a tool package1 de", BODY)
    assert (short.document, short.task) == ("a tool package1 en", "de-synopsis")
    assert {pair.doc_id, translated.doc_id, short.doc_id} == {"package1"}


def test_a_sentence_is_asked_for_what_stands_around_it():
    trained, _ = split_descriptions([description("package1") | {"body": SENTENCES}])
    pairs = [pair for seed in range(20) for pair in passage_pairs(trained, random.Random(seed))]
    assert {pair.query for pair in pairs} == set(re.split(r"(?<=\.) ", SENTENCES))
    for pair in pairs:
        assert pair.query not in pair.document
        assert set(f"{pair.query} {pair.document}".split()) == set(SENTENCES.split())


def test_a_translated_description_is_asked_for_the_english_one():
    rows = [description("package1"), description("package1", lang="de") | {"body": BODY * 9}]
    trained, _ = split_descriptions(rows)
    (pair,) = body_translation_pairs(trained, random.Random(0))
    assert (BODY * 9).startswith(pair.query)
    assert len(pair.query) < len(BODY * 9)
    assert (pair.document, pair.doc_id, pair.task) == (BODY, "package1", "de-body")


def test_a_meaning_yields_one_pair():
    row = {"id": "n1", "words": ["cat"], "definition": "A feline", "examples": [], "parents": []}
    assert len(list(wordnet_pairs([row], random.Random(0)))) == 1


def test_evaluation_sets_are_laid_out_as_beir(tmp_path):
    rows = [description(f"package{i}", lang=lang) for i in range(2000) for lang in ("en", "de")]
    everything, _ = split_descriptions([row | {"package": "package1"} for row in rows])
    write_evaluation(tmp_path, everything, random.Random(0))
    corpus = [json.loads(line) for line in (tmp_path / "german/corpus.jsonl").open()]
    queries = [json.loads(line) for line in (tmp_path / "german/queries.jsonl").open()]
    assert (len(corpus), len(queries)) == (1500, 300)
    assert not {row["_id"] for row in corpus} & {row["_id"] for row in queries}
    judged = (tmp_path / "german/qrels/test.tsv").read_text().splitlines()[1:]
    assert all(line.split("\t")[0] == f"q-{line.split(chr(9))[1]}" for line in judged)


def test_the_tokenizer_fits_the_prompts():
    tokenizer = make_tokenizer(["Katzen schlafen gern.", "cats like to sleep", "猫は眠る"] * 50)
    assert tokenizer.get_vocab_size() <= VOCABULARY
    assert tokenizer.token_to_id(QWEN3_END) == 0
    assert None not in {tokenizer.token_to_id(YES), tokenizer.token_to_id(NO)}
    template = pair_template(tokenizer, "yes-no")(None)
    closing = tokenizer.decode(list(template.closing), skip_special_tokens=False)
    assert closing == "".join(JUDGE_END.split())
    for text in ("cats like to sleep", "猫は眠る"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace(" ", "")


def test_a_word_is_the_same_token_wherever_it_stands():
    tokenizer = make_tokenizer(["cats like to sleep (cats)"] * 50)
    ids = tokenizer.encode("Cats (cats) -cats, cats").ids
    assert ids.count(tokenizer.token_to_id("cats")) == 4


def test_pairs_are_read_by_training(tmp_path):
    trained, _ = split_descriptions([description("package1"), description("package2")])
    write_pairs(tmp_path / "a" / "b.parquet", description_pairs(trained), random.Random(0))
    assert len(PairTable.open(str(tmp_path))) == 2
