"""Flags, TOML files and exit codes, through a real process."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from qbatch.cli import IntList, StrList, parse
from qbatch.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A small job."""

    input: str
    """Where to read."""
    dims: IntList = ()
    """Widths."""
    keep_columns: StrList = ()
    """Columns."""
    dry_run: bool = False
    """Only plan."""
    limit: float | None = None
    """At most this much."""

    def __post_init__(self) -> None:
        if any(dim < 1 for dim in self.dims):
            raise ConfigError(f"dims {self.dims} must be positive; leave out the rest")


def test_flags_and_defaults():
    assert parse(Settings, ["--input", "x"]) == Settings(input="x")
    parsed = parse(Settings, ["--input=x", "--dims", "8,4", "--keep-columns=a,b", "--dry-run"])
    assert parsed == Settings(input="x", dims=(8, 4), keep_columns=("a", "b"), dry_run=True)
    assert parse(Settings, ["--input=x", "--limit=1.5"]).limit == 1.5


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('input = "-a=b"\ndims = [8, 4]\nkeep_columns = "a,b"\ndry_run = true\n')
    parsed = parse(Settings, ["--config", str(file), "--dims=16", "--no-dry-run"])
    assert parsed == Settings(input="-a=b", dims=(16,), keep_columns=("a", "b"), dry_run=False)


@pytest.mark.parametrize("content", [None, "input = ", "\xff"])
def test_an_unreadable_file_is_a_config_error(tmp_path, content):
    file = tmp_path / "job.toml"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read --config"):
        parse(Settings, ["--config", str(file)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inptu=x"], "--input"),
        ([], "--input"),
        (["--input=x", "--dims=0"], "must be positive"),
        (["--input=x", "--dims=a"], "dims"),
        (["--input=x", "--limit=a"], "limit"),
    ],
)
def test_wrong_flags_end_with_code_2_and_say_why(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        parse(Settings, flags)
    assert message in "".join(capsys.readouterr())


def run_job(body: str) -> subprocess.CompletedProcess:
    script = (
        "from dataclasses import dataclass\n"
        "from qbatch import errors\nfrom qbatch.cli import run\n"
        "@dataclass(frozen=True)\nclass C:\n    'A job.'\n    x: int = 1\n"
        f"def job(c):\n    {body}\nrun(C, job)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_the_summary_is_the_last_line_on_stdout():
    done = run_job("print('noise'); return {'rows': c.x}")
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1]) == {"rows": 1}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("QbatchError", 1),
        ("ConfigError", 2),
        ("NoInputError", 3),
        ("BadInputError", 4),
        ("CommitRaceLostError", 5),
        ("StalledError", 6),
        ("QualityGateError", 7),
        ("StorageError", 8),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(error, code):
    done = run_job(f"raise errors.{error}('what is wrong')")
    assert done.returncode == code
    assert "what is wrong" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_bug_shows_its_traceback():
    done = run_job("return 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
