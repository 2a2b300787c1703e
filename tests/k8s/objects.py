"""Finding things in rendered manifests: Ray jobs, Ray clusters, pods and their containers.

Manifests are plain dictionaries as YAML gives them; nothing here asks for a field to be present.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

Document = dict[str, Any]


class Part(NamedTuple):
    """A part of a manifest and how to name it in a message."""

    place: str
    value: dict[str, Any]


def label(document: Document) -> str:
    """Return "Kind/name"."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [d for d in documents if d.get("kind") in kinds]


def names_of(documents: list[Document], kind: str) -> set[str]:
    return {d["metadata"]["name"] for d in of_kind(documents, kind)}


def ray_jobs(documents: list[Document]) -> Iterator[Part]:
    """Yield the spec of every RayJob, templates included."""
    for document in of_kind(documents, "RayJob"):
        yield Part(label(document), document.get("spec", {}))
    for document in of_kind(documents, "RayCronJob"):
        yield Part(label(document), document.get("spec", {}).get("jobTemplate", {}))


def ray_clusters(documents: list[Document]) -> Iterator[Part]:
    """Yield the spec of every RayCluster, those inside of jobs included."""
    for document in of_kind(documents, "RayCluster"):
        yield Part(label(document), document.get("spec", {}))
    for place, job in ray_jobs(documents):
        if "rayClusterSpec" in job:
            yield Part(place, job["rayClusterSpec"])


def groups(cluster: dict[str, Any]) -> Iterator[Part]:
    """Yield head and worker groups of a cluster."""
    if "headGroupSpec" in cluster:
        yield Part("head", cluster["headGroupSpec"])
    yield from worker_groups(cluster)


def worker_groups(cluster: dict[str, Any]) -> Iterator[Part]:
    for group in cluster.get("workerGroupSpecs", []):
        yield Part(f"group {group.get('groupName')}", group)


def pods(documents: list[Document]) -> Iterator[Part]:
    """Yield every pod template: ``metadata`` and ``spec``."""
    for document in documents:
        spec = document.get("spec", {})
        if document.get("kind") == "Pod":
            yield Part(label(document), document)
        elif document.get("kind") in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
            yield Part(label(document), spec.get("template", {}))
        elif document.get("kind") == "CronJob":
            template = spec.get("jobTemplate", {}).get("spec", {}).get("template", {})
            yield Part(label(document), template)
    for place, cluster in ray_clusters(documents):
        for name, group in groups(cluster):
            yield Part(f"{place} {name}", group.get("template", {}))
    for place, job in ray_jobs(documents):
        if "submitterPodTemplate" in job:
            yield Part(f"{place} submitter", job["submitterPodTemplate"])


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    spec = pod.get("spec", {})
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


def pod_users(documents: list[Document]) -> set[tuple[int, int]]:
    """Return the users and groups that pods run as."""
    contexts = [pod["spec"]["securityContext"] for _, pod in pods(documents)]
    return {(context["runAsUser"], context["runAsGroup"]) for context in contexts}


def all_containers(documents: list[Document]) -> Iterator[Part]:
    """Yield every container, the autoscaler's options included."""
    for place, pod in pods(documents):
        for container in containers(pod):
            yield Part(f"{place} container {container.get('name')}", container)
    for place, cluster in ray_clusters(documents):
        if cluster.get("enableInTreeAutoscaling"):
            yield Part(f"{place} autoscaler", cluster.get("autoscalerOptions", {}))


def strings(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string below a value with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{path}[{index}]")
    elif isinstance(value, str):
        yield path, value
