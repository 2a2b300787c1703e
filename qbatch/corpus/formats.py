"""Which format an object is in, by its name."""

from typing import Literal

from qbatch.corpus.config import Format

ObjectFormat = Literal["parquet", "jsonl", "csv", "text", "text-lines"]
Compression = Literal["gz", "zst"]

_BY_EXTENSION: dict[str, ObjectFormat] = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "jsonlines": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "tsv": "csv",
    "txt": "text",
}

_EXPLICIT: dict[Format, ObjectFormat] = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "beir": "jsonl",
    "csv": "csv",
    "text": "text",
    "text-lines": "text-lines",
}

KNOWN_EXTENSIONS = (
    ".parquet .jsonl .ndjson .jsonlines .json .csv .tsv .txt; "
    "all but .parquet also with .gz or .zst"
)


def compression_of(name: str) -> Compression | None:
    """Return the compression around the whole object; Parquet compresses inside."""
    if name.endswith(".gz"):
        return "gz"
    return "zst" if name.endswith(".zst") else None


def extension_of(name: str) -> str:
    """Return the lower-case extension under a compression suffix, without the dot; "" if none."""
    compression = compression_of(name)
    stem = name.removesuffix(f".{compression}")
    _, dot, extension = stem.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def format_of(name: str, wanted: Format) -> ObjectFormat | None:
    """Return the format to read an object in; None when its extension is unknown.

    Args:
        name: Path or URI of the object.
        wanted: The configured format; anything but "auto" wins over the extension.
    """
    if wanted in _EXPLICIT:
        return _EXPLICIT[wanted]
    found = _BY_EXTENSION.get(extension_of(name))
    return None if found == "parquet" and compression_of(name) else found


def is_of_format(name: str, wanted: Format) -> bool:
    """Tell whether an object met in a directory belongs to the corpus.

    With an explicit format, names without any extension count too: many writers give none.
    """
    found = format_of(name, "auto")
    if wanted == "auto":
        return found is not None
    if extension_of(name) == "":
        return True
    return found == ("text" if wanted == "text-lines" else format_of(name, wanted))
