"""What the image's recipe promises; building it needs a registry, so it is read here."""

import re
from fnmatch import fnmatch

import pytest

from tests.k8s.objects import pod_users
from tests.k8s.rendering import overlay
from tests.processes import ROOT


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined."""
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def values(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def test_the_base_is_pinned(instructions):
    (image,) = values(instructions, "ARG")
    assert re.fullmatch(r"PYTHON_IMAGE=\S+:3\.11-slim-\w+", image)
    bases = {rest.split(" AS ")[0] for rest in values(instructions, "FROM")}
    assert bases == {"scratch", "${PYTHON_IMAGE}"}


def test_the_user_is_the_one_that_pods_demand(instructions):
    (user,) = values(instructions, "USER")
    assert {f"{uid}:{gid}" for uid, gid in pod_users(overlay("production"))} == {user}


def test_packages_come_as_locked(instructions):
    (install,) = (run for run in values(instructions, "RUN") if "pip install" in run)
    assert install.split()[-3:] == ["--require-hashes", "-r", "requirements.lock"]


def test_the_hub_is_never_asked_and_nothing_is_secret(instructions):
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(values(instructions, "ENV"))))
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not [n for n in environment if re.search("TOKEN|SECRET|KEY|PASS", n)]
    assert not [i for i, _ in instructions if i == "ADD"]  # it would fetch from the network


def test_what_is_copied_is_there_and_not_ignored(instructions):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = [c.split()[:-1] for c in values(instructions, "COPY") if not c.startswith("--from")]
    sources = {source for names in copied for source in names}
    assert sources == {"requirements.lock", "LICENSE", "NOTICE", "qbatch", "jobs"}
    for source in sources:
        assert (ROOT / source).exists()
        assert [r for r in rules if fnmatch(source, r.removeprefix("!"))][-1] == f"!{source}"
    assert rules[0] == "*"
