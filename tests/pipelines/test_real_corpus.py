"""Sixty thousand real package descriptions through MiniLM, from object store to object store."""

import io
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import zstandard

from qbatch.errors import StorageError
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.storage import Storage
from qbatch.tables import open_vectors
from tests import assets
from tests.swift_server import CREDENTIALS, missing_programs, swift_server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

NUM_ROWS, NUM_FILES = 60_000, 40


def write_corpus(storage: Storage, num_rows: int) -> None:
    """Write the descriptions as 40 zstd JSONL and 40 Parquet files, half of the rows in each."""
    lines = itertools.islice(assets.debian_descriptions().open(encoding="utf-8"), num_rows)
    rows = [json.loads(line) for line in lines]
    assert len(rows) == num_rows
    per_file = num_rows // (2 * NUM_FILES)
    files = [rows[i : i + per_file] for i in range(0, num_rows, per_file)]
    for i, part in enumerate(files):
        if i % 2:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            storage.write(f"{i:03d}.jsonl.zst", zstandard.compress(text.encode()))
        else:
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(part), sink, row_group_size=100)
            storage.write(f"{i:03d}.parquet", sink.getvalue())


def config_for(bucket: str, **changes) -> EmbedCorpusConfig:
    return EmbedCorpusConfig(
        input=f"{bucket}/corpus",
        output=f"{bucket}/vectors",
        model=str(assets.minilm()),
        id_column="id",
        text_column="body",
        title_column="synopsis",
        keep_columns=("lang",),
        unit_bytes=2**19,
        **changes,
    )


@pytest.mark.usefixtures("ray_cluster")
def test_sixty_thousand_rows_over_s3(s3_bucket):
    write_corpus(Storage(f"{s3_bucket}/corpus"), NUM_ROWS)
    config = config_for(s3_bucket)
    summary = embed_corpus(config)
    print(json.dumps(summary))
    num_rejected = sum(summary["rejected"].values())
    assert summary["rows_in"] == NUM_ROWS
    table = open_vectors(config.output).to_table(["object_uri", "row", "passage_index"])
    documents = {(r["object_uri"], r["row"]) for r in table.to_pylist()}
    assert len(documents) + num_rejected == NUM_ROWS
    assert len(table) == summary["passages"] >= len(documents)

    again = embed_corpus(config)
    assert (again["units_made"], again["generation"]) == (0, 1)

    storage = Storage(config.output)
    before = [o.path for o in storage.iter_objects("data")]
    for path in before[5:20:5]:
        storage.delete(path)
    assert embed_corpus(config)["units_made"] == 3
    assert [o.path for o in storage.iter_objects("data")] == before


@pytest.fixture
def swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if missing := missing_programs():
        pytest.skip(f"needs OpenStack Swift and memcached, missing: {missing}")
    with swift_server(tmp_path / "swift") as url:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("corpora")
        yield "s3://corpora"
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def ray_of_its_own(swift):
    """Ray workers keep the environment they start with: this one has the Swift credentials."""
    import ray  # noqa: PLC0415 - slow

    was_running = ray.is_initialized()
    if was_running:
        ray.shutdown()
    ray.init(address="local", num_cpus=os.cpu_count(), object_store_memory=2**29)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_of_its_own")
def test_swift_without_conditional_put_needs_a_single_writer(swift):
    write_corpus(Storage(f"{swift}/corpus"), 4_000)
    config = config_for(swift)
    with pytest.raises(StorageError, match="refuses conditional PUT"):
        embed_corpus(config)
    summary = embed_corpus(replace(config, single_writer=True))
    assert summary["rows_in"] == 4_000
    table = open_vectors(config.output)
    assert table.generation.single_writer
    assert table.num_rows == summary["passages"]
    assert embed_corpus(replace(config, single_writer=True))["units_made"] == 0
