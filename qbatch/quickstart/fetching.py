"""Running the programs that fetch packages."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qbatch.errors import StorageError

_TIMEOUT_S = 900


def run(command: Sequence[str], folder: Path) -> None:
    """Run a program in ``folder``.

    Raises:
        StorageError: It is not installed, fails or takes too long.
    """
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


def say(message: str) -> None:
    """Tell a person what goes on."""
    print(f"qbatch: {message}", file=sys.stderr)  # noqa: T201 (a command's progress)
