"""From the ``input`` of a corpus to the objects that belong to it."""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.formats import KNOWN_EXTENSIONS, is_of_format
from qbatch.errors import NoInputError
from qbatch.storage import ObjectInfo, Storage, object_info

_LOGGER = logging.getLogger(__name__)

_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_HUB_DATASET = re.compile(r"hf://datasets/[^/*?\[]+/[^/*?\[]+")
_BEIR_CORPUS = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst")
_BEIR_QUERIES = ("queries.jsonl", "queries.jsonl.gz", "queries.jsonl.zst")
_SAVED_DATASETS = (("dataset_info.json", "state.json"), ("dataset_dict.json",))


def resolve_config(config: CorpusConfig) -> CorpusConfig:
    """Return the config with "auto" replaced where the directory itself has a format.

    A BEIR folder and a Hugging Face dataset are recognised by the names of their files. A BEIR
    folder also gets its own column names, where the config has the defaults. Resolving twice
    changes nothing. Compute fingerprints from the resolved config.
    """
    if config.format == "beir":
        return _with_beir_columns(config)
    if config.format != "auto" or _names_objects(config.input):
        return config
    storage = Storage(config.input)
    if is_hub_dataset(config.input) or _is_saved_dataset(storage):
        return replace(config, format="hf")
    if _first_existing(storage, _BEIR_CORPUS) and _first_existing(storage, _BEIR_QUERIES):
        return _with_beir_columns(config)
    return config


def is_hub_dataset(uri: str) -> bool:
    """Tell whether a URI names a dataset of the Hugging Face hub, not a file inside one."""
    return _HUB_DATASET.fullmatch(uri.rstrip("/")) is not None


def _names_objects(uri: str) -> bool:
    """Tell whether a URI is a glob, or ends like an object (a directory may, too)."""
    if _GLOB_CHARACTERS.search(uri):
        return True
    return is_of_format(uri, "auto") and not is_hub_dataset(uri)


def _is_saved_dataset(storage: Storage) -> bool:
    return any(all(storage.exists(name) for name in names) for names in _SAVED_DATASETS)


def iter_corpus_objects(config: CorpusConfig) -> Iterator[ObjectInfo]:
    """Yield the objects of a resolved config in name order, holding none of them.

    Names starting with "." or "_" are skipped in silence; objects of other formats are counted and
    reported in one warning.

    Raises:
        NoInputError: Nothing of a known format lies there.
    """
    if config.format == "beir":
        yield _beir_corpus(config)
        return
    num_found = num_unknown = 0
    first_unknown = ""
    for info, is_named in _iter_candidates(config.input):
        if info.path.rpartition("/")[2][:1] in ("", ".", "_"):
            continue
        if (is_named and config.format != "auto") or is_of_format(info.path, config.format):
            num_found += 1
            yield info
        else:
            num_unknown += 1
            first_unknown = first_unknown or info.uri
    if not num_found:
        raise _no_input(config, num_unknown)
    if num_unknown:
        _LOGGER.warning(
            "skipped %d objects under %s that are not %s, the first is %s; known extensions: %s",
            num_unknown,
            config.input,
            config.format if config.format != "auto" else "of a known format",
            first_unknown,
            KNOWN_EXTENSIONS,
        )


def _iter_candidates(uri: str) -> Iterator[tuple[ObjectInfo, bool]]:
    """Yield all objects under a URI, each with whether the user named it (single object, glob)."""
    glob_character = _GLOB_CHARACTERS.search(uri)
    if glob_character:
        root = uri[: glob_character.start()].rpartition("/")[0]
        matches = re.compile(_glob_regex(uri[len(root) :].lstrip("/"))).fullmatch
        storage = Storage(root or ("/" if uri.startswith("/") else "."))
        yield from ((info, True) for info in storage.iter_objects() if matches(info.path))
        return
    is_directory = False
    for info in Storage(uri).iter_objects():
        is_directory = True
        yield info, False
    if not is_directory:
        with suppress(FileNotFoundError):
            yield object_info(uri), True


def _glob_regex(pattern: str) -> str:
    """Translate a glob: ``*`` stays inside one path part, ``**`` spans any number of them."""
    *directories, name = pattern.split("/")
    regexes = ["(?:[^/]+/)*" if d == "**" else _part_regex(d) + "/" for d in directories]
    return "".join(regexes) + (".+" if name == "**" else _part_regex(name))


def _part_regex(part: str) -> str:
    wildcards = {"*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*|\?|\[[^\]]+\])", part)
    return "".join(wildcards.get(p) or _class_or_literal(p) for p in pieces)


def _class_or_literal(piece: str) -> str:
    if not (piece.startswith("[") and piece.endswith("]")):
        return re.escape(piece)
    body = piece[1:-1].replace("\\", r"\\")
    return f"[^{body[1:]}]" if body.startswith("!") else f"[{body}]"


def _first_existing(storage: Storage, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if storage.exists(name)), None)


def _beir_corpus(config: CorpusConfig) -> ObjectInfo:
    storage = Storage(config.input)
    name = _first_existing(storage, _BEIR_CORPUS)
    if name is None:
        raise NoInputError(
            f"{config.input} is no BEIR folder: none of {_BEIR_CORPUS} lies there; "
            "check the path or set another format"
        )
    return storage.info(name)


def _with_beir_columns(config: CorpusConfig) -> CorpusConfig:
    return replace(
        config,
        format="beir",
        id_column="_id" if config.id_column == "doc_id" else config.id_column,
        title_column=config.title_column or "title",
    )


def _no_input(config: CorpusConfig, num_unknown: int) -> NoInputError:
    return NoInputError(
        f"no object to read under {config.input} ({num_unknown} of other formats); known "
        f"extensions: {KNOWN_EXTENSIONS}. Check the path, or set the format explicitly"
    )
