"""Known documents are not embedded again: a changed corpus beside the same one from scratch."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.schema import vector_matrix
from qbatch.storage import Storage
from qbatch.tables import open_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_FILES, ROWS_PER_FILE = 6, 30
Row = dict[str, object]


def rows_of(file: int) -> list[Row]:
    """Short texts, and every tenth one long enough to be split."""
    return [
        {
            "doc_id": f"{file}-{j}",
            "text": f"text number {j} of file {file}. " * (30 if j % 10 == 0 else 1),
            "lang": "en" if j % 2 else "de",
        }
        for j in range(ROWS_PER_FILE)
    ]


def write_file(uri: str, name: str, rows: list[Row]) -> None:
    Storage(uri).write(name, "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def config(tmp_path, tiny_model) -> EmbedCorpusConfig:
    for i in range(NUM_FILES):
        write_file(f"{tmp_path}/corpus", f"{i}.jsonl", rows_of(i))
    return EmbedCorpusConfig(
        input=f"{tmp_path}/corpus",
        output=f"{tmp_path}/vectors",
        model=tiny_model,
        dtype="float32",
        max_tokens=64,
        keep_columns=("lang",),
        unit_bytes=2048,
    )


def sorted_rows(uri: str):
    table = open_vectors(uri).to_table()
    uris = table["object_uri"].cast(pa.string())
    table = table.set_column(0, "object_uri", uris).combine_chunks()
    return table.sort_by([(name, "ascending") for name in ("object_uri", "row", "passage_index")])


def assert_as_from_scratch(config: EmbedCorpusConfig, tmp_path) -> None:
    fresh = replace(config, output=f"{tmp_path}/scratch", reuse="off")
    embed_corpus(fresh)
    found, wanted = sorted_rows(config.output), sorted_rows(fresh.output)
    assert found.schema.equals(wanted.schema)
    for name in wanted.column_names:
        if name.startswith("vector"):
            np.testing.assert_allclose(
                vector_matrix(found[name]), vector_matrix(wanted[name]), atol=1e-6
            )
        else:
            assert found[name].to_pylist() == wanted[name].to_pylist(), name


def change_everything(uri: str) -> int:
    """Edit, insert, delete, reorder, rename, split and join; return how many texts are new."""
    storage = Storage(uri)
    edited = rows_of(0)
    edited[3]["text"] = "quite another text"
    write_file(uri, "0.jsonl", edited)
    write_file(
        uri, "1.jsonl", [{"doc_id": "in", "text": "an inserted text", "lang": "fr"}, *rows_of(1)]
    )
    write_file(uri, "2.jsonl", rows_of(2)[::-1][5:])
    storage.delete("3.jsonl")
    write_file(
        uri, "renamed.jsonl", [{**row, "doc_id": f"new-{i}"} for i, row in enumerate(rows_of(3))]
    )
    for name in ("4.jsonl", "5.jsonl"):
        storage.delete(name)
    write_file(uri, "joined.jsonl", rows_of(5) + rows_of(4))
    return 2


def test_only_new_texts_are_embedded(config, tmp_path):
    first = embed_corpus(config)
    assert first["passages_embedded"] == first["passages"] > NUM_FILES * ROWS_PER_FILE
    num_new = change_everything(config.input)
    summary = embed_corpus(config)
    assert summary["units_reused"] == 0
    assert summary["passages_embedded"] == num_new
    assert_as_from_scratch(config, tmp_path)
    again = embed_corpus(config)
    assert (again["units_made"], again["passages_embedded"]) == (0, 0)


@pytest.mark.slow
def test_by_object_takes_from_the_same_object_only(config, tmp_path):
    config = replace(config, reuse="by-object")
    embed_corpus(config)
    change_everything(config.input)
    summary = embed_corpus(config)
    counts = Counter(
        uri.rpartition("/")[2] for uri in sorted_rows(config.output)["object_uri"].to_pylist()
    )
    assert summary["passages_embedded"] == 2 + counts["renamed.jsonl"] + counts["joined.jsonl"]
    assert_as_from_scratch(config, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": (16, 8), "vector_dtype": "float16"},
        pytest.param({"keep_columns": ()}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_every_stored_width_is_copied_and_kept_columns_are_those_of_now(config, changes, tmp_path):
    config = replace(config, **{k: v for k, v in changes.items() if k != "keep_columns"})
    embed_corpus(config)
    config = replace(config, **changes)
    write_file(config.input, "0.jsonl", [{**row, "lang": "xx"} for row in rows_of(0)])
    assert embed_corpus(config)["passages_embedded"] == 0
    assert_as_from_scratch(config, tmp_path)


@pytest.mark.slow
def test_what_another_model_made_is_not_taken(config):
    first = embed_corpus(config)
    other = replace(config, max_tokens=48)
    assert embed_corpus(other)["passages_embedded"] > first["passages"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_damaged_source_is_embedded_again(config, damage, tmp_path):
    embed_corpus(config)
    storage = Storage(config.output)
    for path in [o.path for o in storage.iter_objects("data")]:
        data = bytearray(storage.read(path))
        data[len(data) // 2] ^= 0xFF
        if damage == "gone":
            storage.delete(path)
        else:
            storage.write(path, bytes(data))
    change_everything(config.input)
    summary = embed_corpus(config)
    assert summary["passages_embedded"] == summary["passages"]
    assert_as_from_scratch(config, tmp_path)


@pytest.mark.slow
def test_bad_rows_beside_known_ones_are_still_rejected(config, tmp_path):
    config = replace(config, max_bad_fraction=0.5)
    embed_corpus(config)
    bad = [{"doc_id": "bad", "text": None}, *rows_of(0)]
    write_file(config.input, "0.jsonl", bad)
    summary = embed_corpus(config)
    assert (summary["passages_embedded"], sum(summary["rejected"].values())) == (0, 1)
    assert_as_from_scratch(config, tmp_path)
    rejects = open_vectors(config.output).rejects()
    assert pc.all(pc.equal(rejects["doc_id"], "bad")).as_py()
