"""requirements.lock: what the image installs, each file known by its hash."""

import re
import tomllib

from packaging.requirements import Requirement

from tests.processes import ROOT


def locked() -> dict[str, tuple[str, int]]:
    """Return version and number of hashes of each locked package."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        name, version = re.match(r"([\w.-]+)==([\w.+]+)", line).groups()
        found[name] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line)))
    return found


def tested_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_package_has_hashes_and_the_tested_version():
    versions = {name.replace("_", "-").lower(): v for name, v in tested_versions().items()}
    for name, (version, num_hashes) in locked().items():
        assert num_hashes > 0, name
        assert versions.get(name, version) == version, f"{name}: run make lock"


def test_all_that_qbatch_depends_on_is_locked_and_nothing_else_is_left_open():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    found = locked()
    assert not [r.name for r in needed if r.name not in found], "run make lock"
    assert not [r.name for r in needed if found[r.name][0] not in r.specifier], "run make lock"
    cuda = [name for name in found if name not in {n.lower() for n in tested_versions()}]
    assert "torch" in found
    assert [name for name in cuda if name.startswith("nvidia-")], "CUDA libraries are locked too"
