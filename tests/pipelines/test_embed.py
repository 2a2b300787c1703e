"""The embed job in this process, against a local Ray, a disk and a real S3 server."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from qbatch.errors import BadInputError, ConfigError, NoInputError, StalledError
from qbatch.manifest import fingerprint_id, latest_generation
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.loading import load_spec
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.embed import (
    EmbedCorpusConfig,
    embed_corpus,
    embedding_fingerprint,
    make_task,
)
from qbatch.schema import vector_matrix
from qbatch.storage import Storage
from qbatch.tables import open_vectors
from tests.embedding_server import embedding_server
from tests.tiny_models import write_tiny_encoder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_FILES = 6
ROWS_PER_FILE = 40


def write_corpus(uri: str) -> None:
    for i in range(NUM_FILES):
        rows = [
            {"doc_id": f"{i}-{j}", "text": f"text number {j} of file {i}", "lang": "en"}
            for j in range(ROWS_PER_FILE)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Storage(uri).write(f"{i}.jsonl", lines.encode())


@pytest.fixture
def config(s3_bucket, tiny_model) -> EmbedCorpusConfig:
    write_corpus(f"{s3_bucket}/corpus")
    return EmbedCorpusConfig(
        input=f"{s3_bucket}/corpus",
        output=f"{s3_bucket}/vectors",
        model=tiny_model,
        dtype="float32",
        unit_bytes=1024,
    )


@pytest.fixture
def disk_config(tmp_path, tiny_model) -> EmbedCorpusConfig:
    write_corpus(str(tmp_path / "corpus"))
    return EmbedCorpusConfig(
        input=str(tmp_path / "corpus"),
        output=str(tmp_path / "vectors"),
        model=tiny_model,
        dtype="float32",
    )


def published_rows(uri: str) -> Counter:
    table = open_vectors(uri).to_table(["object_uri", "row", "passage_index"])
    return Counter(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_every_row_is_embedded_once_and_a_second_run_makes_nothing(config):
    summary = embed_corpus(config)
    num_rows = NUM_FILES * ROWS_PER_FILE
    assert (summary["generation"], summary["rows_in"]) == (1, num_rows)
    assert (summary["passages"], summary["rejected"]) == (num_rows, {})
    assert summary["units_made"] >= NUM_FILES
    assert summary["tokens"] > num_rows
    assert 0 < summary["pack_fill"] <= 1
    assert set(summary["seconds"]) == {"read", "tokenize", "forward", "write", "idle", "total"}
    rows = published_rows(config.output)
    assert len(rows) == num_rows
    assert set(rows.values()) == {1}
    report = json.loads(Storage(config.output).read("report.json"))
    details = report.pop("details")
    assert report == summary
    assert 0 < sum(details["passage_tokens"]["counts"]) <= summary["passages"]
    assert max(details["throughput"]["tokens_per_s"]) > 0
    assert b"Length of passages" in Storage(config.output).read("report.html")

    again = embed_corpus(config)
    assert (again["units_made"], again["units_reused"]) == (0, summary["units_made"])
    assert (again["generation"], again["tokens"]) == (1, summary["tokens"])


def test_deleted_outputs_are_remade_exactly(config):
    made = embed_corpus(config)["units_made"]
    storage = Storage(config.output)
    before = [o.path for o in storage.iter_objects("data")]
    for path in before[:3]:
        storage.delete(path)
    summary = embed_corpus(config)
    assert (summary["units_made"], summary["units_reused"]) == (3, made - 3)
    assert [o.path for o in storage.iter_objects("data")] == before
    assert set(published_rows(config.output).values()) == {1}


def test_a_changed_object_remakes_its_units_only(config):
    made = embed_corpus(config)["units_made"]
    storage = Storage(config.input)
    storage.write("0.jsonl", storage.read("0.jsonl") + b'{"doc_id": "new", "text": "one more"}\n')
    storage.delete("5.jsonl")
    summary = embed_corpus(config)
    assert summary["generation"] == 2
    assert summary["rows_in"] == (NUM_FILES - 1) * ROWS_PER_FILE + 1
    assert summary["units_reused"] >= made * (NUM_FILES - 2) // NUM_FILES - 1
    ids = open_vectors(config.output).to_table(["doc_id"])["doc_id"].to_pylist()
    assert "new" in ids
    assert not any(doc_id.startswith("5-") for doc_id in ids)
    assert len(published_rows(config.output)) == summary["rows_in"]
    assert len(open_vectors(config.output, generation=1).to_table()) == NUM_FILES * ROWS_PER_FILE


def test_a_finished_but_unpublished_unit_is_checked_and_reused(disk_config):
    first = embed_corpus(disk_config)
    storage = Storage(disk_config.output)
    storage.delete("manifests/00000001.json")
    again = embed_corpus(disk_config)
    assert (again["units_made"], again["units_reused"]) == (0, first["units_made"])
    assert again["rows_in"] == first["rows_in"]


@pytest.mark.slow
def test_a_damaged_unpublished_unit_is_made_again(disk_config):
    embed_corpus(replace(disk_config, unit_bytes=512))
    storage = Storage(disk_config.output)
    storage.delete("manifests/00000001.json")
    path = next(storage.iter_objects("data")).path
    data = storage.read(path)
    storage.write(path, data[:-20] + bytes(20))
    summary = embed_corpus(replace(disk_config, unit_bytes=512))
    assert summary["units_made"] == 1
    assert storage.read(path) == data


def test_vectors_are_those_of_the_model(disk_config, tiny_model):
    embed_corpus(replace(disk_config, keep_columns=("lang",)))
    table = open_vectors(disk_config.output).to_table()
    pairs = [doc_id.split("-") for doc_id in table["doc_id"].to_pylist()]
    texts = [f"text number {j} of file {i}" for i, j in pairs]
    embedder = EmbedderConfig(model_path=Path(tiny_model), dtype="float32").build()
    tokens = TextTokenizer.load(Path(tiny_model)).encode(texts)
    expected = embedder.embed(tokens.ids, tokens.lengths)
    np.testing.assert_allclose(vector_matrix(table["vector"]), expected, atol=1e-5)
    assert set(table["lang"].to_pylist()) == {"en"}
    assert table["passage_id"].to_pylist() == [f"{d}#0" for d in table["doc_id"].to_pylist()]
    assert table["end_char"].to_pylist() == [len(text) for text in texts]


@pytest.mark.slow
def test_several_widths_in_one_pass(disk_config):
    embed_corpus(replace(disk_config, dims=(32, 8), vector_dtype="float16"))
    table = open_vectors(disk_config.output).to_table()
    full, short = vector_matrix(table["vector"]), vector_matrix(table["vector_8"])
    assert (full.shape[1], short.shape[1]) == (32, 8)
    assert full.dtype == short.dtype == np.float16
    assert cosines(full[:, :8], short).min() > 0.9999
    np.testing.assert_allclose(np.linalg.norm(short.astype(np.float32), axis=1), 1, atol=1e-2)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float32), other.astype(np.float32)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / norms


@pytest.mark.slow
def test_int8_is_calibrated_once_for_the_life_of_a_table(disk_config, tmp_path):
    config = replace(disk_config, vector_dtype="int8", dims=(32, 8))
    embed_corpus(config)
    scales = latest_generation(Storage(config.output)).fingerprint["scales"]
    Storage(config.input).write("more.jsonl", b'{"doc_id": "x", "text": "zzzz qqqq !!!! ~~~~"}\n')
    embed_corpus(config)
    assert latest_generation(Storage(config.output)).fingerprint["scales"] == scales
    embed_corpus(replace(config, vector_dtype="float32", output=str(tmp_path / "exact")))
    stored, exact = (by_identity(uri) for uri in (config.output, str(tmp_path / "exact")))
    for column, scale in zip(("vector", "vector_8"), scales, strict=True):
        matrix = vector_matrix(stored[column])
        assert matrix.dtype == np.int8
        assert cosines(matrix, vector_matrix(exact[column])).min() > 0.998
        assert np.abs(matrix.astype(np.float32) / scale).max() < 1.5  # the stored scale fits


def by_identity(uri: str) -> pa.Table:
    table = open_vectors(uri).to_table()
    keys = pa.table({"uri": table["object_uri"].cast(pa.string()), "row": table["row"]})
    return table.take(pc.sort_indices(keys, [("uri", "ascending"), ("row", "ascending")]))


def unit_fingerprint(config: EmbedCorpusConfig) -> str:
    spec = load_spec(Path(config.model))
    task = make_task(config, spec, "float32")
    fingerprint = fingerprint_id(embedding_fingerprint(task, spec))
    return replace(task, fingerprint=fingerprint).unit_fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"max_tokens": 64},
        {"overlap_tokens": 8},
        {"dims": (8,)},
        {"keep_columns": ("lang",)},
        {"vector_dtype": "float16"},
        {"text_column": "body"},
        {"title_column": "title"},
    ],
)
def test_settings_that_change_the_output_change_its_name(disk_config, changed):
    assert unit_fingerprint(replace(disk_config, **changed)) != unit_fingerprint(disk_config)


@pytest.mark.parametrize(
    "changed",
    [
        {"token_budget": 100},
        {"max_actors": 2},
        {"gpus_per_actor": 1.0},
        {"max_bad_files": 3},
        {"output": "elsewhere"},
    ],
)
def test_settings_of_speed_and_place_do_not(disk_config, changed):
    assert unit_fingerprint(replace(disk_config, **changed)) == unit_fingerprint(disk_config)


def test_other_weights_are_another_fingerprint(disk_config, tmp_path):
    other = str(write_tiny_encoder(tmp_path / "other-model", seed=1))
    assert unit_fingerprint(replace(disk_config, model=other)) != unit_fingerprint(disk_config)


BROKEN = b'{"doc_id": "a", "text": "fine"}\n{"doc_id": \n{"doc_id": "c", "text": null}\n'


def test_bad_rows_are_quarantined_and_counted(disk_config):
    Storage(disk_config.input).write("broken.jsonl", BROKEN)
    summary = embed_corpus(replace(disk_config, max_bad_fraction=0.01))
    assert summary["rejected"] == {"bad_json": 1, "null_text": 1}
    assert summary["passages"] == summary["rows_in"] - 2
    rejects = open_vectors(disk_config.output).rejects().to_pylist()
    assert [(r["row"], r["reason"]) for r in rejects] == [(32, "bad_json"), (44, "null_text")]
    assert rejects[0]["object_uri"].endswith("broken.jsonl")
    assert rejects[0]["raw"] == b'{"doc_id": '


def test_too_many_bad_rows_publish_nothing_but_keep_the_work(disk_config):
    Storage(disk_config.input).write("broken.jsonl", BROKEN)
    with pytest.raises(BadInputError, match="2 bad rows among 243"):
        embed_corpus(disk_config)
    assert latest_generation(Storage(disk_config.output)) is None
    summary = embed_corpus(replace(disk_config, max_bad_fraction=0.01))
    assert summary["units_made"] == 0


def test_on_bad_row_fail_stops_with_its_own_error(disk_config):
    Storage(disk_config.input).write("broken.jsonl", BROKEN)
    with pytest.raises(BadInputError, match=r"broken\.jsonl") as held:
        embed_corpus(replace(disk_config, on_bad_row="fail"))
    # Whoever holds on to the error holds no processors that the next job needs.
    summary = embed_corpus(replace(disk_config, max_bad_fraction=1, stall_timeout_s=100))
    assert summary["generation"] == 1
    assert held.value.__cause__ is not None


def test_unreadable_objects_are_limited_by_number(disk_config):
    Storage(disk_config.input).write("broken.parquet", b"PAR1 not really")
    with pytest.raises(BadInputError, match="1 unreadable objects"):
        embed_corpus(disk_config)
    summary = embed_corpus(replace(disk_config, max_bad_files=1))
    assert summary["rejected"] == {"corrupt_file": 1}
    assert summary["rows_in"] == NUM_FILES * ROWS_PER_FILE


def test_an_empty_prefix_is_no_input(tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputError, match="empty"):
        embed_corpus(
            EmbedCorpusConfig(
                input=str(tmp_path / "empty"), output=str(tmp_path / "out"), model=tiny_model
            )
        )


def test_impossible_settings_are_refused_before_work(disk_config):
    with pytest.raises(ConfigError, match="--dims=64 asks for more than the 32"):
        embed_corpus(replace(disk_config, dims=(64,)))
    with pytest.raises(ConfigError, match="--max-tokens=4096 is more than the 128"):
        embed_corpus(replace(disk_config, max_tokens=4096))
    with pytest.raises(ConfigError, match="need more than the 0 GPUs"):
        embed_corpus(replace(disk_config, gpus_per_actor=1.0))


def test_a_standstill_ends_the_job_and_the_next_run_goes_on(disk_config):
    with pytest.raises(StalledError, match=r"no unit moved for 0\.2 s"):
        embed_corpus(replace(disk_config, stall_timeout_s=0.2))  # an actor takes longer to start
    assert embed_corpus(disk_config)["passages"] == NUM_FILES * ROWS_PER_FILE


def test_non_finite_vectors_reject_their_documents(tmp_path, disk_config, tiny_model):
    poisoned = tmp_path / "poisoned-model"
    shutil.copytree(tiny_model, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    tilde = json.loads((poisoned / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    weights["embeddings.word_embeddings.weight"][tilde] = float("nan")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    Storage(disk_config.input).write("x.jsonl", b'{"doc_id": "bad", "text": "a ~ b"}\n')
    config = replace(disk_config, model=str(poisoned), max_bad_fraction=0.01)
    summary = embed_corpus(config)
    assert summary["rejected"] == {"non_finite_vector": 1}
    assert summary["passages"] == NUM_FILES * ROWS_PER_FILE
    assert open_vectors(config.output).rejects()["doc_id"].to_pylist() == ["bad"]
    with pytest.raises(BadInputError, match=r"cannot embed row 0 of .*: non_finite_vector\."):
        embed_corpus(replace(config, output=str(tmp_path / "other"), on_bad_row="fail"))


def test_dry_run_estimates_and_starts_nothing(disk_config, tmp_path):
    plan = embed_corpus(replace(disk_config, dry_run=True, gpu_hourly_price=2.0))
    assert plan["rows_estimated"] == NUM_FILES * ROWS_PER_FILE
    assert plan["bytes"] == sum(o.size for o in Storage(disk_config.input).iter_objects())
    assert plan["tokens_per_s_measured"]
    assert sum(plan["token_histogram"].values()) == NUM_FILES * ROWS_PER_FILE
    assert plan["cost_estimated"] is not None
    assert not (tmp_path / "vectors").exists()
    given = embed_corpus(replace(disk_config, dry_run=True, tokens_per_s=100.0, max_actors=2))
    assert given["seconds_estimated"] == pytest.approx(given["tokens_estimated"] / 200, rel=0.01)
    summary = embed_corpus(disk_config)
    assert plan["tokens_estimated"] == summary["tokens"]


@pytest.mark.slow
def test_a_server_computes_what_the_actors_would(disk_config, tmp_path):
    """The same fingerprint and the same vectors, and the text that the server refuses is named."""
    tilde = json.loads(Path(disk_config.model, "tokenizer.json").read_text())["model"]["vocab"]["~"]
    embed_corpus(disk_config)
    with embedding_server(disk_config.model, refused=tilde) as (endpoint, state):
        config = replace(disk_config, output=f"{tmp_path}/served", engine="http", endpoint=endpoint)
        embed_corpus(config)
        assert state.statuses[200] > 0
        tables = [open_vectors(uri) for uri in (disk_config.output, config.output)]
        first, second = (table.to_table().sort_by("passage_id") for table in tables)
        assert first.drop_columns(["vector"]).equals(second.drop_columns(["vector"]))
        np.testing.assert_allclose(
            vector_matrix(first["vector"]), vector_matrix(second["vector"]), atol=1e-6
        )
        assert tables[0].generation.fingerprint == tables[1].generation.fingerprint
        Storage(config.input).write("x.jsonl", b'{"doc_id": "bad", "text": "a ~ b"}\n')
        summary = embed_corpus(replace(config, max_bad_fraction=0.01))
    assert summary["rejected"] == {"non_finite_vector": 1}
    assert open_vectors(config.output).rejects()["doc_id"].to_pylist() == ["bad"]


def test_settings_of_a_server_are_checked(disk_config):
    with pytest.raises(ConfigError, match="--engine=http needs --endpoint"):
        replace(disk_config, engine="http")
    with pytest.raises(ConfigError, match="give --engine=http to use it"):
        replace(disk_config, endpoint="http://x")
    with pytest.raises(ConfigError, match="--dtype=auto with --engine=http"):
        replace(disk_config, engine="http", endpoint="http://x", dtype="auto")
