"""From the command line to one function call: flags, TOML files, exit codes, the summary line.

A job is a frozen dataclass and a function that takes it and returns its summary. Flags override the
file given with ``--config``; its keys are the flags' names. The summary is the last line on stdout.
"""

import argparse
import json
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from qbatch.errors import ConfigError, QbatchError

ConfigT = TypeVar("ConfigT")
T = TypeVar("T")

log = logging.getLogger("qbatch")


def _comma_separated(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: tuple(parse(p.strip()) for p in args[0].split(",") if p),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(str(item) for item in value)],
    )


IntList = Annotated[tuple[int, ...], _comma_separated(int, "INT,INT,...")]
FloatList = Annotated[tuple[float, ...], _comma_separated(float, "FLOAT,FLOAT,...")]
StrList = Annotated[tuple[str, ...], _comma_separated(str, "NAME,NAME,...")]

Derived = Annotated[T, tyro.conf.Fixed, tyro.conf.SuppressFixed]
"""A setting of a nested job that the outer job fills in: no flag, no key."""


def run(
    config_type: type[ConfigT],
    job: Callable[[ConfigT], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Run one job as this process: parse, log to stderr, print the summary, exit with its code.

    Args:
        config_type: What flags are parsed to.
        job: What takes it and returns the summary.
        arguments: Flags; None is those of the process.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every hub request
    try:
        config = parse(config_type, sys.argv[1:] if arguments is None else arguments)
        summary = job(config)
    except QbatchError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
    sys.stderr.flush()
    print(json.dumps(summary), flush=True)  # noqa: T201 - the contract of every job
    sys.exit(0)


def parse(config_type: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Build a job's config from flags, and from a TOML file when ``--config`` names one.

    Raises:
        ConfigError: The file cannot be read. Wrong flags and values end the process with code 2.
    """
    splitter = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    splitter.add_argument("--config", type=Path)
    known, flags = splitter.parse_known_args(list(arguments))
    from_file = list(_flags_of(_read_toml(known.config))) if known.config else []
    return tyro.cli(
        config_type,
        args=[*from_file, *flags],
        description=f"{sys.modules['__main__'].__doc__ or config_type.__doc__}\n\n"
        "--config FILE.toml gives any of these flags as keys; flags override it.",
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"cannot read --config {path}: {error}. Give a TOML file whose keys are flag names"
        ) from error


def _flags_of(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if isinstance(value, Mapping):
            yield from _flags_of(value, f"{name}.")
        elif isinstance(value, bool):
            yield f"--{name}" if value else f"--{prefix}no-{key.replace('_', '-')}"
        elif isinstance(value, list):
            yield f"--{name}={','.join(str(item) for item in value)}"
        else:
            yield f"--{name}={value}"
