"""Batch semantic search: embed, index, search and rerank whole corpora on Ray."""

from qbatch.reader import open_index, open_release, open_run, open_table, open_vectors

__all__ = ["open_index", "open_release", "open_run", "open_table", "open_vectors"]
__version__ = "0.1.0"
