"""Tables published by hand, as a job would, and by jobs over a few texts."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from qbatch.manifest import Generation, publish
from qbatch.pipelines.build_index import BuildIndexConfig, build_index
from qbatch.pipelines.embed import EmbedCorpusConfig, embed_corpus
from qbatch.pipelines.unit_files import write_rejects, write_table_file
from qbatch.schema import FILES
from qbatch.storage import Storage
from qbatch.tables import PublishedTable


def publish_tables(
    uri: str,
    tables: Sequence[pa.Table],
    rejects: Sequence[pa.Table] = (),
    *,
    after: int = 0,
    kind: str = "run",
) -> PublishedTable:
    """Publish tables, a file each, and reject files, as the generation next to ``after``."""
    storage = Storage(uri)
    files = [
        write_table_file(storage, f"data/{after + i:032x}", table) for i, table in enumerate(tables)
    ]
    refused = [
        write_rejects(storage, f"{after + i:032x}", table) for i, table in enumerate(rejects)
    ]
    draft = Generation(
        kind=kind,
        fingerprint={},
        config={},
        counts={},
        files=pa.Table.from_pylist(files, schema=FILES),
        rejects=pa.Table.from_pylist(refused, schema=FILES),
    )
    return PublishedTable(storage, publish(storage, draft, after=after))


def publish_texts(folder: Path, model: Path, texts: Sequence[str]) -> None:
    """Embed and index texts, ids d0, d1 ..., into ``folder``/vectors and ``folder``/index."""
    lines = [json.dumps({"doc_id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    Storage(f"{folder}/corpus").write("a.jsonl", "\n".join(lines).encode())
    embedding = EmbedCorpusConfig(
        input=f"{folder}/corpus", output=f"{folder}/vectors", model=str(model), dtype="float32"
    )
    embed_corpus(embedding)
    index = BuildIndexConfig(
        vectors=f"{folder}/vectors",
        output=f"{folder}/index",
        factory="Flat",
        num_shards=1,
        num_probes=5,
    )
    build_index(index)
