"""Manifests against the API server's own schemas, so that a misspelt field is an error.

Kubernetes' kinds come from the package ``kubernetes-validate``. KubeRay's come from its CRDs in
``../shared/kuberay-crds`` beside the repository, or in QBATCH_KUBERAY_CRDS.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from tests.k8s.objects import Document, label
from tests.processes import ROOT

KUBERNETES = "1.37"
RAY = "ray.io/v1"
MONITORING = "monitoring.coreos.com/v1"
CRDS = Path(os.environ.get("QBATCH_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))

needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no KubeRay CRDs in {CRDS}; QBATCH_KUBERAY_CRDS names another place"
)


def core_violations(documents: list[Document]) -> Iterator[str]:
    """Yield what the API server would refuse in every kind but KubeRay's."""
    for document in documents:
        if document["apiVersion"] == MONITORING:
            yield from _violations(document, _POD_MONITOR)
        elif document["apiVersion"] != RAY:
            try:
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield _message(document, error)


def ray_violations(documents: list[Document]) -> Iterator[str]:
    """Yield what the API server would refuse in KubeRay's kinds."""
    for document in documents:
        if document["apiVersion"] == RAY:
            yield from _violations(document, ray_schema(document["kind"]))


def _violations(document: Document, schema: dict[str, Any]) -> Iterator[str]:
    for error in Draft202012Validator(schema).iter_errors(document):
        yield _message(document, error)


def _message(document: Document, error: ValidationError) -> str:
    path = ".".join(str(part) for part in error.absolute_path)
    return f"{label(document)} at {path}: {error.message[-300:]}"  # a message quotes whole objects


@cache
def ray_schema(kind: str) -> dict[str, Any]:
    """Return the strict schema of a KubeRay kind."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    definition = yaml.load(path.read_text("utf-8"), yaml.CSafeLoader)
    versions = {v["name"]: v for v in definition["spec"]["versions"]}
    schema = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server knows it by itself
    return schema


def strict(schema: Any) -> Any:
    """Return a structural schema as JSON Schema that refuses unknown fields.

    The API server drops unknown fields without a word; ``properties`` lists the known ones unless
    ``x-kubernetes-preserve-unknown-fields`` stands beside it.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result = {"type": ["integer", "string"]}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


_POD_MONITOR = strict(
    {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": MONITORING},
            "kind": {"const": "PodMonitor"},
            "metadata": {"type": "object"},
            "spec": {
                "type": "object",
                "required": ["selector", "podMetricsEndpoints"],
                "properties": {
                    "selector": {
                        "type": "object",
                        "required": ["matchLabels"],
                        "properties": {
                            "matchLabels": {
                                "type": "object",
                                "additionalProperties": {"type": "string"},
                            },
                        },
                    },
                    "podMetricsEndpoints": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["port"],
                            "properties": {
                                "port": {"type": "string"},
                                "relabelings": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "properties": {
                                            "action": {"enum": ["replace"]},
                                            "sourceLabels": {
                                                "type": "array",
                                                "items": {"pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
                                            },
                                            "targetLabel": {"type": "string"},
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    }
)
"""The part of the Prometheus operator's PodMonitor that is used here; its CRD is not at hand."""
