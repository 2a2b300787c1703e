"""What makes manifests unsafe although every schema accepts them.

Each rule yields one message for every fault.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from tests.k8s import objects
from tests.k8s.objects import Document, Part, label, of_kind

METADATA_ADDRESSES = ("169.254.169.254", "fd00:ec2::254")


def exposure(documents: list[Document]) -> Iterator[str]:
    """Nothing is reachable from outside of the cluster."""
    for document in of_kind(documents, "Ingress", "HTTPRoute", "Gateway", "Route"):
        yield f"{label(document)}: exposes the cluster; use kubectl port-forward"
    services = [Part(label(d), d["spec"]) for d in of_kind(documents, "Service")]
    for place, cluster in objects.ray_clusters(documents):
        head = cluster.get("headGroupSpec", {})
        services.append(Part(f"{place} head", {"type": head.get("serviceType", "ClusterIP")}))
        services.append(Part(f"{place} headService", head.get("headService", {}).get("spec", {})))
        if head.get("enableIngress") or head.get("ingressOptions"):
            yield f"{place}: an Ingress for the dashboard; use kubectl port-forward"
    for place, service in services:
        if service.get("type", "ClusterIP") != "ClusterIP":
            yield f"{place}: Service of type {service['type']}; give ClusterIP"
        if service.get("externalIPs"):
            yield f"{place}: Service with externalIPs"


def token_authentication(documents: list[Document]) -> Iterator[str]:
    """Ray's dashboard runs code for whoever reaches it (CVE-2023-48022) unless a token is asked."""
    for place, cluster in objects.ray_clusters(documents):
        options, version = cluster.get("authOptions", {}), str(cluster.get("rayVersion", ""))
        if options.get("mode") != "token":
            yield f"{place}: authOptions.mode is {options.get('mode')}; give token"
        elif not re.match(r"\d+\.\d+", version) or _numbers(version) < (2, 52):
            yield f"{place}: rayVersion is {version!r}; tokens need 2.52 or later"
    for place, job in objects.ray_jobs(documents):
        if job.get("rayClusterSpec", {}).get("authOptions", {}).get("enableK8sTokenAuth"):
            yield f"{place}: enableK8sTokenAuth is not for RayJobs"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def pod_privileges(documents: list[Document]) -> Iterator[str]:
    """Pods ask for nothing that the "restricted" pod security standard forbids."""
    for place, pod in objects.pods(documents):
        spec = pod.get("spec", {})
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{place}: {field}"
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{place}: hostPath {volume['hostPath'].get('path')}"
        context = spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("runAsUser") == 0:
            yield f"{place}: may run as root; set runAsNonRoot: true and a runAsUser"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{place}: no seccompProfile RuntimeDefault"


def container_privileges(documents: list[Document]) -> Iterator[str]:
    """Containers neither."""
    for place, container in objects.all_containers(documents):
        context = container.get("securityContext", {})
        if context.get("privileged") or context.get("runAsUser") == 0:
            yield f"{place}: privileged or root"
        if context.get("allowPrivilegeEscalation", True):
            yield f"{place}: set allowPrivilegeEscalation: false"
        capabilities = context.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            yield f"{place}: drop ALL capabilities and add none"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{place}: hostPort"


def enforcement(documents: list[Document]) -> Iterator[str]:
    """The API server holds the same standard."""
    for namespace in of_kind(documents, "Namespace"):
        labels = namespace["metadata"].get("labels", {})
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{label(namespace)}: set pod-security.kubernetes.io/enforce: restricted"


_SECRET_NAME = re.compile(
    r"SECRET|PASSW|(ACCESS|API|PRIVATE)[_-]?KEY|CREDENTIAL|TOKEN$", re.IGNORECASE
)
_SECRET_VALUES = {
    "an AWS key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a hub token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    "a password in a URI": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
}
_ASSIGNMENT = re.compile(
    r"""([A-Za-z_][\w.-]*)["']?[ \t]*[:=][ \t]*["']?[^\s"']|--([\w-]+)[ \t]+\S"""
)
"""A key of YAML or TOML with a value, or a flag with one."""


def secret_values(documents: list[Document]) -> Iterator[str]:
    """No secret stands in a manifest: it would be read in git, dashboard and logs."""
    for document in of_kind(documents, "Secret"):
        yield f"{label(document)}: a Secret does not belong into the repository"
    for document in documents:
        for path, text in objects.strings(document):
            for what, pattern in _SECRET_VALUES.items():
                if pattern.search(text):
                    yield f"{label(document)}: {what} at {path}"


def secret_names(documents: list[Document]) -> Iterator[str]:
    """Nothing that is called a secret gets its value in a manifest."""
    for place, container in objects.all_containers(documents):
        for variable in container.get("env", []):
            if "value" in variable and _is_secret(variable["name"]):
                yield f"{place}: {variable['name']} as plain text; mount it, or use the account"
    for place, job in objects.ray_jobs(documents):
        for field in ("runtimeEnvYAML", "entrypoint"):
            yield from _assigned(f"{place} {field}", job.get(field, ""))
    for document in of_kind(documents, "ConfigMap"):
        for name, text in document.get("data", {}).items():
            if not name.endswith(".py"):
                yield from _assigned(f"{label(document)} {name}", text)


def _assigned(place: str, text: str) -> Iterator[str]:
    for key, flag in _ASSIGNMENT.findall(text):
        name = key or flag
        if _is_secret(name):
            yield f"{place}: {name} as plain text; everybody with the dashboard reads it"


def _is_secret(name: str) -> bool:
    """Tell a secret by its name; the name of a file that holds one is none."""
    return bool(_SECRET_NAME.search(name)) and not name.upper().endswith(("_FILE", "_PATH"))


def images(documents: list[Document]) -> Iterator[str]:
    """Every image is pinned by tag or digest."""
    for place, container in objects.all_containers(documents):
        image = container.get("image")
        if image is None and place.endswith("autoscaler"):
            continue  # the operator takes the head's
        tag = (image or "").rpartition("/")[2].partition(":")[2]
        digest = re.search(r"@sha256:[0-9a-f]{64}$", image or "")
        if not digest and (not tag or tag == "latest"):
            yield f"{place}: image {image} is not pinned; give a tag or a digest, not latest"


def accounts(documents: list[Document]) -> Iterator[str]:
    """Accounts exist, and a pod without one of its own gets no token."""
    known = objects.names_of(documents, "ServiceAccount")
    for place, pod in objects.pods(documents):
        spec = pod.get("spec", {})
        name = spec.get("serviceAccountName")
        if name is not None and name not in known:
            yield f"{place}: there is no ServiceAccount {name}; there are {sorted(known)}"
        if name is None and spec.get("automountServiceAccountToken") is not False:
            yield f"{place}: no serviceAccountName; set automountServiceAccountToken: false"
    for place, cluster in objects.ray_clusters(documents):
        for name, group in objects.groups(cluster):
            mounts = group.get("template", {}).get("spec", {}).get("automountServiceAccountToken")
            needed = name == "head" and cluster.get("enableInTreeAutoscaling", False)
            if mounts is not needed:
                yield (
                    f"{place} {name}: automountServiceAccountToken is {mounts}; only a head with "
                    f"an autoscaler needs a token, give {needed}"
                )


def starter_rights(documents: list[Document]) -> Iterator[str]:
    """The starter may do what it does and nothing else; nobody else may do anything."""
    for document in of_kind(documents, "ClusterRole", "ClusterRoleBinding"):
        yield f"{label(document)}: rights beyond the namespace"
    granted = _granted(documents)
    wanted: dict[str, set[tuple[str, str]]] = {}
    for cron in of_kind(documents, "CronJob"):
        pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        command = " ".join(objects.containers({"spec": pod})[0].get("command", []))
        template = re.search(r"--template=(\S+)", command)
        needs = {("get", f"raycronjobs/{template[1]}")} if template else set()
        needs |= {("create", "rayjobs"), ("get", "rayjobs")}
        wanted[pod.get("serviceAccountName", "default")] = needs
        if not pod.get("automountServiceAccountToken"):
            yield f"{label(cron)}: has no token; set automountServiceAccountToken: true"
    for account in granted.keys() | wanted.keys():
        has, needs = granted.get(account, set()), wanted.get(account, set())
        for verb, what in sorted(needs - has):
            yield f"ServiceAccount/{account}: may not {verb} {what}"
        for verb, what in sorted(has - needs):
            yield f"ServiceAccount/{account}: may {verb} {what} and need not"


def _granted(documents: list[Document]) -> dict[str, set[tuple[str, str]]]:
    roles = {d["metadata"]["name"]: d for d in of_kind(documents, "Role")}
    granted: dict[str, set[tuple[str, str]]] = {}
    for binding in of_kind(documents, "RoleBinding"):
        rules = roles.get(binding["roleRef"]["name"], {}).get("rules", [])
        rights = {
            (verb, f"{resource}/{name}" if name else resource)
            for rule in rules
            for verb in rule["verbs"]
            for resource in rule["resources"]
            for name in rule.get("resourceNames", [""])
        }
        for subject in binding["subjects"]:
            if subject.get("namespace") == binding["metadata"]["namespace"]:
                granted.setdefault(subject["name"], set()).update(rights)
    return granted


def network(documents: list[Document]) -> Iterator[str]:
    """Everything is closed but what is opened, and cloud metadata stays closed."""
    policies = [(label(d), d["spec"]) for d in of_kind(documents, "NetworkPolicy")]
    closed = [
        spec
        for _, spec in policies
        if spec["podSelector"] == {}
        and set(spec["policyTypes"]) == {"Ingress", "Egress"}
        and not spec.get("ingress")
        and not spec.get("egress")
    ]
    if not closed:
        yield "no NetworkPolicy that closes ingress and egress of all pods"
    for place, spec in policies:
        for rule in spec.get("ingress", []):
            peers = rule.get("from", [])
            if not peers or any("ipBlock" in p or p == {"namespaceSelector": {}} for p in peers):
                yield f"{place}: open to everybody; name the pods that may come in"
        for rule in spec.get("egress", []):
            if not rule.get("to"):
                yield f"{place}: open to every address"
            for peer in rule.get("to", []):
                yield from _metadata(place, peer.get("ipBlock", {}))


def _metadata(place: str, block: dict[str, Any]) -> Iterator[str]:
    for text in METADATA_ADDRESSES:
        address = ipaddress.ip_address(text)
        inside = block and address in ipaddress.ip_network(block["cidr"])
        if inside and not any(address in ipaddress.ip_network(e) for e in block.get("except", [])):
            yield f"{place}: {block['cidr']} lets pods ask cloud metadata at {text}; except it"


def reachability(documents: list[Document]) -> Iterator[str]:
    """Every pod is selected by a policy that lets it out; else the closed default stops it."""
    policies = [d["spec"] for d in of_kind(documents, "NetworkPolicy")]
    for place, pod in objects.pods(documents):
        labels = pod.get("metadata", {}).get("labels", {})
        opened = [
            spec for spec in policies
            if spec.get("egress") and spec["podSelector"] and _selects(spec["podSelector"], labels)
        ]  # fmt: skip
        if not opened:
            yield f"{place}: no NetworkPolicy lets it reach anything; its labels are {labels}"


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    exact = all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    among = all(
        e["operator"] == "In" and labels.get(e["key"]) in e["values"]
        for e in selector.get("matchExpressions", [])
    )
    return exact and among


def namespaces(documents: list[Document]) -> Iterator[str]:
    """Everything lies in the one namespace that the documents bring."""
    spaces = objects.names_of(documents, "Namespace")
    for document in documents:
        if document["kind"] != "Namespace":
            space = document["metadata"].get("namespace")
            if space not in spaces:
                yield f"{label(document)}: namespace is {space}; there are {sorted(spaces)}"


RULES = (
    exposure,
    token_authentication,
    pod_privileges,
    container_privileges,
    enforcement,
    secret_values,
    secret_names,
    images,
    accounts,
    starter_rights,
    network,
    reachability,
    namespaces,
)
