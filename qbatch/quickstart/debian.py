"""Texts out of the Debian archive, which apt downloads and checks."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qbatch.errors import StorageError
from qbatch.quickstart.fetching import run, say

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


def build_descriptions(target: Path) -> None:
    """Write all package descriptions as JSON lines; see ``assets.fetch_debian_descriptions``.

    Raises:
        StorageError: apt fails, or brings no descriptions.
    """
    say("downloading package descriptions from Debian (about 50 MB)")
    apt = _update_apt(target.with_name("apt"), _LANGUAGES)
    lists = apt / "lists"
    sources = _read_sources(lists)
    seen = set()
    with target.open("w", encoding="utf-8") as out:
        for path in sorted(lists.glob("*_i18n_Translation-*")):
            for row in _read_descriptions(path):
                if row["id"] not in seen:
                    seen.add(row["id"])
                    row["source"] = sources.get(row["package"], row["package"])
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not seen:
        raise StorageError(
            f"apt-get brought {len(list(lists.iterdir()))} lists, none with package descriptions. "
            "Check that /etc/apt names a Debian archive."
        )


def build_perlfaq(target: Path) -> None:
    """Write questions about Perl and their answers as JSON lines; see ``assets.fetch_perlfaq``.

    Raises:
        StorageError: apt fails, or brings no questions.
    """
    files = _unpack("perl-doc", target)
    pods = sorted(files.glob("usr/share/perl/*/pod/perlfaq[1-9].pod"))
    _write_rows(target, "perl-doc", (row for pod in pods for row in _read_questions(pod)))


def build_wordnet(target: Path) -> None:
    """Write the meanings of WordNet as JSON lines; see ``assets.fetch_wordnet``.

    Raises:
        StorageError: apt fails, or brings no meanings.
    """
    files = sorted(_unpack("wordnet-base", target).glob("usr/share/wordnet/data.*"))
    _write_rows(target, "wordnet-base", (row for file in files for row in _read_meanings(file)))


def _unpack(package: str, target: Path) -> Path:
    """Download a package beside ``target`` and return the folder of its files."""
    say(f"downloading {package} from Debian (about 20 MB with the lists)")
    apt = _update_apt(target.with_name("apt"), ())
    run(["apt-get", "-c", str(apt / "apt.conf"), "-qq", "download", package], apt)
    (archive,) = apt.glob(f"{package}_*.deb")
    run(["dpkg-deb", "-x", str(archive), str(apt / package)], apt)
    return apt / package


def _write_rows(target: Path, package: str, rows: Iterator[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if not lines:
        raise StorageError(f"{package} holds no texts; it is laid out in another way than expected")
    target.write_text("".join(lines), "utf-8")


def _read_meanings(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the synsets of a data file of WordNet, laid out as wndb(5WN) says."""
    for line in file.read_text("utf-8").splitlines():
        if line.startswith(" "):
            continue  # the licence
        fields, _, gloss = line.partition(" | ")
        offset, _, kind, count, *rest = fields.split()
        num_words = int(count, 16)
        words = [word.replace("_", " ").partition("(")[0] for word in rest[: 2 * num_words : 2]]
        pointers = rest[2 * num_words + 1 :]
        examples = re.findall(r'"([^"]+)"', gloss)
        yield {
            "id": f"{kind.replace('s', 'a')}{offset}",
            "words": words,
            "definition": re.split(r';\s*"', gloss)[0].strip(),
            "examples": examples,
            "parents": [
                pointers[i + 2] + pointers[i + 1]
                for i in range(0, len(pointers) - 3, 4)
                if pointers[i] in {"@", "@i"}
            ],
        }


def _read_sources(lists: Path) -> dict[str, str]:
    """Return the source package of each binary package."""
    sources: dict[str, str] = {}
    for path in sorted(lists.glob("*_Packages")):
        for stanza in path.read_text(encoding="utf-8").split("\n\n"):
            package = re.search(r"^Package: (\S+)", stanza, re.MULTILINE)
            source = re.search(r"^Source: (\S+)", stanza, re.MULTILINE)
            if package:
                sources.setdefault(package[1], (source or package)[1])
    return sources


def _read_questions(pod: Path) -> Iterator[dict[str, str]]:
    """Yield the sections of a POD file whose heading is a question, without markup."""
    plain = re.sub(r"[BCFILSX]<+\s*(?:[^<>|]*\|)?([^<>]*?)\s*>+", r"\1", pod.read_text("utf-8"))
    for number, section in enumerate(re.split(r"^=head2 ", plain, flags=re.MULTILINE)[1:]):
        question, _, body = section.partition("\n\n")
        answer = re.split(r"^=head1 ", body, flags=re.MULTILINE)[0]
        answer = re.sub(r"^=\w+.*\n?", "", answer, flags=re.MULTILINE).strip()
        if answer:
            question = " ".join(question.split())
            yield {"id": f"{pod.stem}-{number}", "question": question, "answer": answer}


def _update_apt(folder: Path, languages: Sequence[str]) -> Path:
    """Read the archive's lists into ``folder``, apart from the system's own, and return it."""
    for path in (folder / "lists" / "partial", folder / "cache" / "archives" / "partial"):
        path.mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text(_apt_config(folder, languages))
    run(["apt-get", "-c", str(config), "-qq", "update"], folder)
    return folder


def _apt_config(folder: Path, wanted: Sequence[str]) -> str:
    languages = " ".join(f'"{language}";' for language in wanted)
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
                "package": package[1],
                "synopsis": synopsis,
                "body": body,
                "lang": text[1],
            }
