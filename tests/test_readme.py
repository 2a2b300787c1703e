"""The commands in README are commands of this repository, flag by flag."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from qbatch.cli import parse
from tests.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return the shell commands of all indented blocks, as words."""
    found = []
    for block in re.findall(r"(?:^    .*\n)+", README, re.MULTILINE):
        text = block.replace("\\\n", " ")
        for line in text.splitlines():
            for command in re.split(r" && ", line.strip()):
                if re.match(r"(python|make|ray job submit|kubectl|docker) ", command):
                    found.append(shlex.split(command, comments=True))
    return found


COMMANDS = commands()


def job_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the job file and its flags, when the command runs a job."""
    for i, word in enumerate(words):
        if re.fullmatch(r"jobs/\w+\.py", word):
            return word, words[i + 1 :]
    return None


JOB_COMMANDS = [job for job in map(job_of, COMMANDS) if job and job[1] != ["--help"]]


def test_readme_shows_every_job():
    shown = {file for file, _ in JOB_COMMANDS}
    assert shown == {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}


@pytest.mark.parametrize(("file", "flags"), JOB_COMMANDS, ids=lambda v: str(v)[:70])
def test_every_flag_exists_and_their_values_make_sense(file, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = (ROOT / file).read_text(encoding="utf-8")
    module, config = re.search(
        r"from (qbatch\.pipelines\.\w+) import .*?(\w+Config)", source
    ).groups()
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")
    parse(getattr(importlib.import_module(module), config), flags)


def test_make_targets_and_modules_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in COMMANDS:
        if words[0] == "make":
            assert words[1] in targets
        if words[:2] == ["python", "-m"] and words[2].startswith(("qbatch", "tests")):
            path = Path(ROOT, *words[2].split("."))
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), words


def test_files_named_in_readme_exist():
    named = re.findall(r"`((?:qbatch|jobs|k8s|tests)/[\w/.-]+\.\w+)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
