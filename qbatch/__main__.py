"""What there is: the jobs, or what was published somewhere; and questions about engines.

python -m qbatch                     # the jobs
python -m qbatch s3://bucket/index   # the generations of a table, or the releases of a night
python -m qbatch parity --help       # may the vectors of two engines share an index?
python -m qbatch roofline --help     # how fast could a GPU embed?
python -m qbatch forecast --help     # what would ten billion documents take and cost?
"""

import ast
import sys
from pathlib import Path
from typing import NoReturn

from qbatch.cli import run
from qbatch.errors import QbatchError
from qbatch.manifest import latest_generation
from qbatch.report.forecast import ForecastConfig, forecast
from qbatch.storage import Storage

JOBS = Path(__file__).resolve().parents[1] / "jobs"


def main(arguments: list[str]) -> int:
    """Print the answer; return the exit code."""
    if arguments and arguments[0] in _COMMANDS:
        _COMMANDS[arguments[0]](arguments[1:])
    try:
        lines = _published(arguments[0]) if arguments else _jobs()
    except QbatchError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command
        return error.exit_code
    print("\n".join(lines))  # noqa: T201
    return 0


def _parity(arguments: list[str]) -> NoReturn:
    from qbatch.pipelines.parity import ParityConfig, parity  # noqa: PLC0415 - imports torch

    run(ParityConfig, parity, arguments)


def _roofline(arguments: list[str]) -> NoReturn:
    from qbatch.models.roofline import RooflineConfig, roofline  # noqa: PLC0415 - transformers

    run(RooflineConfig, roofline, arguments)


def _forecast(arguments: list[str]) -> NoReturn:
    run(ForecastConfig, forecast, arguments)


_COMMANDS = {"parity": _parity, "roofline": _roofline, "forecast": _forecast}


def _jobs() -> list[str]:
    """Return a line for each job: its file and the first line of its docstring."""
    lines = []
    for path in sorted(JOBS.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"python jobs/{path.name:24} {text.partition(chr(10))[0]}")
    return lines or ["the jobs lie in jobs/ of the repository, which is not installed here"]


def _published(uri: str) -> list[str]:
    """Return what the newest generation of a table or of releases says."""
    newest = latest_generation(Storage(uri))
    if newest is None:
        return [f"nothing was published in {uri}"]
    lines = [f"{newest.kind} generation {newest.number}, made {newest.created}"]
    lines += [f"  {name}: {value}" for name, value in newest.counts.items()]
    for name, table in newest.details.get("tables", {}).items():
        lines.append(f"  {name}: {table['path']} at generation {table['generation']}")
    if newest.kind != "release":
        size = sum(newest.files["bytes"].to_pylist())
        lines.append(f"  files: {newest.files.num_rows}, {size / 2**20:,.1f} MiB")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
