"""Batch semantic search: embed, index, search and rerank whole corpora on Ray."""

__version__ = "0.1.0"
