"""What to read: the location of a corpus, its format and its columns."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qbatch import schema
from qbatch.errors import ConfigError

Format = Literal["auto", "parquet", "jsonl", "csv", "text", "text-lines", "hf", "beir"]

_RESERVED = frozenset(schema.DOCUMENTS.names) | frozenset(schema.PASSAGES.names)

_WHERE_AND_HOW = ("input", "unit_bytes", "on_bad_row")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """A corpus and how to read it."""

    input: str
    """Directory, prefix, single object, glob (``dir/*.parquet``, ``**``) or ``hf://datasets/ORG/NAME``."""
    format: Format = "auto"
    """"auto" decides by directory content (BEIR, saved Hugging Face dataset), else by extension."""
    id_column: str = "doc_id"
    """A row without an id gets ``<object name>:<row>``."""
    text_column: str = "text"
    """Objects and rows without it are rejected."""
    title_column: str | None = None
    """None: the corpus has no titles."""
    keep_columns: tuple[str, ...] = ()
    """Columns carried to the output, in this order; null where an object has none."""
    unit_bytes: int = 16 * 2**20
    """Aimed size of a unit; larger objects are cut, smaller ones grouped."""
    on_bad_row: Literal["quarantine", "fail", "skip"] = "quarantine"
    """Write bad rows to the rejects table, stop at the first, or only count them."""
    max_document_bytes: int = 8 * 2**20
    """UTF-8 bytes; longer texts are cut, because a tokenizer reads all it is given."""
    hf_split: str = "train"
    """Split of a Hugging Face dataset; ignored by other formats."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input is empty; give the directory, object or glob to read")
        for name in ("unit_bytes", "max_document_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a positive byte count")
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ConfigError(
                f"keep_columns names a column twice: {self.keep_columns}; once is enough"
            )
        taken = sorted(c for c in self.keep_columns if c in _RESERVED or c.startswith("vector"))
        if taken:
            raise ConfigError(
                f"keep_columns holds {taken}, names of output columns (reserved: "
                f"{sorted(_RESERVED)} and vector*); rename these columns in the corpus"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings that change what is read from a span.

        Location and unit size are not among them: they show in the spans.
        """
        settings = asdict(self)
        return {k: v for k, v in settings.items() if k not in _WHERE_AND_HOW}
