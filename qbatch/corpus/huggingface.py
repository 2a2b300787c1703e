"""Hugging Face datasets: those saved to a directory, and those of the hub."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.listing import is_hub_dataset
from qbatch.corpus.readers.columns import check_text_column, columnar_rows, columns_to_read
from qbatch.corpus.rows import RawRows, only_rejects
from qbatch.corpus.spans import Span, Unit, even_ranges
from qbatch.errors import ConfigError, NoInputError, SourceChangedError
from qbatch.storage import split_uri

_BATCH_ROWS = 16384


def plan_dataset(config: CorpusConfig) -> Iterator[Unit]:
    """Yield units of equal row ranges, about ``config.unit_bytes`` of Arrow data each.

    Raises:
        NoInputError: There is no dataset.
        ConfigError: The dataset has no split of that name.
    """
    dataset = _load_dataset(config.input, config.hf_split)
    num_rows = dataset.num_rows
    row_bytes = max(1, dataset.data.nbytes // max(1, len(dataset.data)))
    unit_rows = max(1, config.unit_bytes // row_bytes)
    for start, stop in even_ranges(num_rows, unit_rows):
        span = Span(config.input, num_rows, dataset._fingerprint, "rows", -1, start, stop)
        yield Unit((span,))


def read_dataset(span: Span, config: CorpusConfig) -> Iterator[RawRows]:
    """Yield the rows of a span; ``row`` is the index in the split.

    Raises:
        SourceChangedError: The dataset is not the one that was planned.
    """
    dataset = _load_version(span.uri, config.hf_split, span.version)
    fingerprint = dataset._fingerprint
    if (dataset.num_rows, fingerprint) != (span.size, span.version):
        raise SourceChangedError(
            f"{span.uri} now has {dataset.num_rows} rows, fingerprint {fingerprint}; the plan was "
            f"made from {span.size} rows, fingerprint {span.version}. Start the job again"
        )
    schema = dataset.data.schema
    unusable = check_text_column(schema, config)
    if unusable is not None:
        yield only_rejects(unusable)
        return
    columns = dataset.select_columns(columns_to_read(schema, config)).with_format("arrow")
    for start in range(span.start, span.stop, _BATCH_ROWS):
        table: pa.Table = columns[start : min(start + _BATCH_ROWS, span.stop)]
        for batch in table.combine_chunks().to_batches():
            yield columnar_rows(batch, start, config)


@lru_cache(maxsize=1)
def _load_version(uri: str, split: str, version: str) -> Any:  # noqa: ANN401
    """Load once for all units of a plan; ``version`` is there to tell plans apart."""
    return _load_dataset(uri, split)


def _load_dataset(uri: str, split: str) -> Any:  # noqa: ANN401  # datasets is imported on first use
    import datasets  # noqa: PLC0415  # takes a second, and most corpora do without

    if is_hub_dataset(uri):
        name = uri.rstrip("/").removeprefix("hf://datasets/")
        return datasets.load_dataset(name, split=split)
    scheme, path = split_uri(uri)
    try:
        found = datasets.load_from_disk(path if scheme == "file" else uri)
    except FileNotFoundError as error:
        raise NoInputError(
            f"no saved dataset at {uri}: {error}; give the directory that save_to_disk wrote"
        ) from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ConfigError(
            f"the dataset at {uri} has no split {split!r}; it has {sorted(found)}; set hf_split"
        )
    return found[split]
