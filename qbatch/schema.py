"""The exact Arrow schemas of every table, and the two-way road between vectors and matrices.

Vectors never become Python lists: a ``vector`` column is FixedSizeList, its buffer is the matrix.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
"""Part of every fingerprint: raise it when a table changes its meaning."""

VectorDtype = Literal["float32", "float16", "int8"]

ComputeDtype = Literal["float32", "bfloat16", "float16"]

Weights = Literal["float", "int8"]
"""Of a model's linear layers: in the compute dtype, or rounded to int8, on processors only."""

_VALUE_TYPES: dict[VectorDtype, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
}

IDENTITY_FIELDS = (
    pa.field("object_uri", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
)
"""Where a row came from; accounting rests on it and never on the user's ids.

``row`` is the row number inside the object, or the byte offset of the line for line formats
(in the decompressed stream): a byte span knows offsets, not numbers.
"""

DOCUMENTS = pa.schema(
    [
        *IDENTITY_FIELDS,
        pa.field("doc_id", pa.large_string(), nullable=False),
        pa.field("title", pa.large_string()),
        pa.field("text", pa.large_string(), nullable=False),
    ]
)
"""Validated rows of a unit; kept columns follow these."""

_PASSAGE_FIELDS = (
    *IDENTITY_FIELDS,
    pa.field("doc_id", pa.large_string(), nullable=False),
    pa.field("passage_id", pa.large_string(), nullable=False),
    pa.field("passage_index", pa.int32(), nullable=False),
    pa.field("start_char", pa.int32(), nullable=False),
    pa.field("end_char", pa.int32(), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("content_hash", pa.binary(16), nullable=False),
)

PASSAGES = pa.schema([*_PASSAGE_FIELDS, pa.field("token_ids", pa.large_list(pa.int32()))])
"""Tokenized passages on their way to the embedder; kept columns follow these."""

REJECTS = pa.schema(
    [
        pa.field("object_uri", pa.string(), nullable=False),
        pa.field("row", pa.int64()),  # null: the object as a whole
        pa.field("doc_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("raw", pa.binary()),
    ]
)

FILES = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
"""The file lists of a manifest; ``path`` is relative to the table."""

UNITS = pa.schema(
    [
        pa.field("unit_key", pa.string(), nullable=False),
        pa.field("spans", pa.large_string(), nullable=False),  # JSON, see corpus.spans
        *(field for field in FILES),
        pa.field("rejects", pa.struct(list(FILES))),  # null: nothing was rejected
        pa.field("counts", pa.string(), nullable=False),  # JSON, see pipelines.embed_stages
    ]
)
"""The plan of a generation with the output of every unit; the next night starts from it."""


PARTS = pa.schema(
    [
        pa.field("name", pa.large_string(), nullable=False),  # stays when the content changes
        *(field for field in FILES),
        pa.field("selected", pa.list_(pa.int32())),  # null: all rows of the file
    ]
)
"""Vectors files with the names by which they keep their place in an index.

Where only some rows of a file are meant, ``rows`` is their number.
"""

SHARDS = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("shard_key", pa.string(), nullable=False),
        pa.field("row_base", pa.int64(), nullable=False),  # row 0 of the shard, over all shards
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("index", pa.struct(list(FILES)), nullable=False),
        pa.field("ids", pa.struct(list(FILES)), nullable=False),
        pa.field("probes", pa.struct(list(FILES)), nullable=False),
        pa.field("facts", pa.string(), nullable=False),  # JSON, see index.building
        pa.field("parts", pa.list_(pa.struct(list(PARTS))), nullable=False),  # in row order
        pa.field("dead", pa.list_(pa.int32()), nullable=False),  # rows that are no longer found
        pa.field("delta", pa.bool_(), nullable=False),  # rows that came after the others were built
    ]
)
"""The plan of an index generation: what each shard holds, and where its files are."""

RUN = pa.schema(
    [
        pa.field("query_id", pa.large_string(), nullable=False),
        pa.field("doc_id", pa.large_string(), nullable=False),
        pa.field("passage_id", pa.large_string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""Documents found for queries: ranks count from 1 without gaps, higher scores are better."""

RERANKED = pa.schema(
    [
        *RUN,
        pa.field("log_odds", pa.float32(), nullable=False),
        pa.field("retrieval_rank", pa.int32()),  # null: the candidates had no order
        pa.field("retrieval_score", pa.float32()),  # null: the candidates had no scores
    ]
)
"""A run in the order of a reranker.

``log_odds`` is what the model said and ranks by, whatever the scorer: log-odds of relevance, or the
mean log-likelihood of a query's tokens. ``score`` is made from it: a number from 0 to 1, or a
fusion with the retrieval; then the fusion ranks.
"""

LOCATED_RUN = pa.schema(
    [
        *RUN,
        pa.field("query_row", pa.int64(), nullable=False),  # in its file of queries
        pa.field("row", pa.int64(), nullable=False),  # over all shards, see SHARDS.row_base
    ]
)
"""A run that also says where its queries and passages lie, so that nothing is looked up by id."""

RECOMMENDATIONS = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field(
            "items",
            pa.list_(
                pa.field(
                    "element",
                    pa.struct(
                        [
                            pa.field("doc_id", pa.large_string(), nullable=False),
                            pa.field("score", pa.float32(), nullable=False),
                        ]
                    ),
                    nullable=False,
                )
            ),
            nullable=False,
        ),
    ]
)
"""One row a key, ready for a key-value store: a query or a document and its items, best first."""

RECOMMENDATION_CHANGES = pa.schema(
    [*RECOMMENDATIONS, pa.field("deleted", pa.bool_(), nullable=False)]
)
"""What to do to a store that holds the generation before: put a row, or delete its key."""

QRELS = pa.schema(
    [
        pa.field("query_id", pa.large_string(), nullable=False),
        pa.field("doc_id", pa.large_string(), nullable=False),
        pa.field("relevance", pa.int32(), nullable=False),
    ]
)
"""Judgements; documents that are not listed are not relevant."""

TRAINING_PAIRS = pa.schema(
    [
        pa.field("query_id", pa.large_string()),
        pa.field("query", pa.large_string(), nullable=False),
        pa.field("doc_id", pa.large_string()),
        pa.field("document", pa.large_string(), nullable=False),
        pa.field("negatives", pa.large_list(pa.large_string())),
        pa.field("negative_ids", pa.large_list(pa.large_string())),  # of each negative, or null
        pa.field("instruction", pa.large_string()),  # of the query; null: the model's own
        pa.field("document_instruction", pa.large_string()),  # null, but for symmetric tasks
        pa.field("task", pa.string()),  # retrieval, bitext, similarity, classification
        pa.field("score", pa.float32()),  # cosine of query and document, by the model that filtered
    ]
)
"""A query, a document that answers it and hard negatives that do not; further columns may follow.

All but ``query`` and ``document`` may be null or absent. Texts carry no prompt: a query with an
instruction gets the prompt of its model, and so does a document with one. Two documents are the
same if their texts or their ids are. Rows of one instruction and task share batches.
"""


def vector_column_names(dims: Sequence[int]) -> list[str]:
    """Return the column of each width: ``vector`` for the first, ``vector_<dim>`` for the rest."""
    return ["vector" if i == 0 else f"vector_{dim}" for i, dim in enumerate(dims)]


def vectors_schema(
    dims: Sequence[int], dtype: VectorDtype, kept_fields: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Return the schema of a vectors table with one vector column per width in ``dims``."""
    vectors = [
        pa.field(name, pa.list_(pa.field("element", _VALUE_TYPES[dtype]), dim), nullable=False)
        for name, dim in zip(vector_column_names(dims), dims, strict=True)
    ]
    return pa.schema([*_PASSAGE_FIELDS, *vectors, *kept_fields])


def vector_array(matrix: np.ndarray) -> pa.FixedSizeListArray:
    """Wrap a C-contiguous matrix of shape (rows, dim) as a FixedSizeList column without copying."""
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    value_type = pa.field("element", flat.type)
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(value_type, matrix.shape[1]))


def vector_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return a vector column as one matrix of shape (rows, dim).

    A column of one chunk is not copied; several chunks are concatenated once.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dim = column.type.list_size
    matrices = [_chunk_matrix(chunk, dim) for chunk in chunks]
    if len(matrices) == 1:
        return matrices[0]
    dtype = column.type.value_type.to_pandas_dtype()
    return np.concatenate(matrices) if matrices else np.empty((0, dim), dtype)


def _chunk_matrix(chunk: pa.FixedSizeListArray, dim: int) -> np.ndarray:
    values = chunk.values.slice(chunk.offset * dim, len(chunk) * dim)
    flat: np.ndarray = values.to_numpy(zero_copy_only=True)
    return flat.reshape(-1, dim)
