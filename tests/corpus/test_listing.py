import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.listing import iter_corpus_objects, resolve_config
from qbatch.errors import NoInputError
from qbatch.storage import Storage

FILES = [
    "a.parquet",
    "b.jsonl",
    "deep/c.JSONL.gz",
    "deep/er/d.parquet",
    "deep/er/_SUCCESS.json",
    "deep/.hidden.jsonl",
    "[x].csv",
    "notes.md",
    "noextension",
    "z.parquet.gz",
]


@pytest.fixture
def corpus(store_uri):
    storage = Storage(store_uri)
    for path in FILES:
        storage.write(path, b"x")
    return store_uri


def listed(uri: str, **settings) -> list[str]:
    return [info.path for info in iter_corpus_objects(CorpusConfig(input=uri, **settings))]


def test_a_directory_gives_known_formats_in_name_order(corpus):
    assert listed(corpus) == [
        "[x].csv",
        "a.parquet",
        "b.jsonl",
        "deep/c.JSONL.gz",
        "deep/er/d.parquet",
    ]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("*.parquet", ["a.parquet"]),
        ("**/*.parquet", ["a.parquet", "deep/er/d.parquet"]),
        ("deep/**", ["c.JSONL.gz", "er/d.parquet"]),
        ("**/er/*", ["deep/er/d.parquet"]),
        ("?.jsonl", ["b.jsonl"]),
        ("[a-b].*", ["a.parquet", "b.jsonl"]),
        ("[!a].*", ["b.jsonl"]),
        ("d*p/c.*", ["deep/c.JSONL.gz"]),
    ],
)
def test_globs(corpus, pattern, paths):
    assert listed(f"{corpus}/{pattern}") == paths


def test_a_single_object(corpus):
    assert listed(f"{corpus}/b.jsonl") == ["b.jsonl"]


def test_an_explicit_format_takes_its_extensions_and_names_without_one(corpus):
    assert listed(corpus, format="parquet") == ["a.parquet", "deep/er/d.parquet", "noextension"]


def test_an_explicit_format_takes_whatever_the_user_named(corpus):
    assert listed(f"{corpus}/notes.md", format="text") == ["notes.md"]
    assert listed(f"{corpus}/n*", format="text-lines") == ["noextension", "notes.md"]


def test_unknown_extensions_make_one_warning(corpus, caplog):
    listed(corpus)
    (record,) = caplog.records
    message = record.getMessage()
    assert "skipped 3 objects" in message
    assert "noextension" in message
    assert ".parquet" in message


@pytest.mark.parametrize("path", ["absent", "absent.jsonl", "*.nothing", "deep/er/*.md"])
def test_no_object_is_no_input(corpus, path):
    with pytest.raises(
        NoInputError, match=r"no object to read under .*known extensions: \.parquet"
    ):
        listed(f"{corpus}/{path}")


def test_only_unknown_extensions_are_no_input(corpus):
    Storage(f"{corpus}/other").write("x.md", b"x")
    with pytest.raises(NoInputError, match="1 of other formats"):
        listed(f"{corpus}/other")


def test_a_beir_folder_is_recognised(store_uri):
    storage = Storage(store_uri)
    for path in ("corpus.jsonl.gz", "queries.jsonl", "qrels/test.tsv", "extra.jsonl"):
        storage.write(path, b"x")
    config = resolve_config(CorpusConfig(input=store_uri))
    assert (config.format, config.id_column, config.title_column) == ("beir", "_id", "title")
    assert [info.path for info in iter_corpus_objects(config)] == ["corpus.jsonl.gz"]
    assert resolve_config(config) == config


def test_beir_columns_yield_to_the_configured_ones(store_uri):
    config = CorpusConfig(input=store_uri, format="beir", id_column="key", title_column="head")
    assert resolve_config(config) == config


def test_a_folder_without_queries_is_no_beir_folder(store_uri):
    Storage(store_uri).write("corpus.jsonl", b"x")
    assert resolve_config(CorpusConfig(input=store_uri)).format == "auto"


def test_an_explicit_beir_folder_must_hold_a_corpus(corpus):
    with pytest.raises(NoInputError, match="is no BEIR folder"):
        listed(corpus, format="beir")


@pytest.mark.parametrize("uri", ["hf://datasets/org/name", "hf://datasets/org/name/"])
def test_a_hub_dataset_is_recognised_without_network(uri):
    assert resolve_config(CorpusConfig(input=uri)).format == "hf"


def test_a_glob_inside_a_hub_dataset_lists_files():
    config = CorpusConfig(input="hf://datasets/org/name/*.parquet")
    assert resolve_config(config) == config
