"""What the KubeRay operator (v1.7) refuses, and what makes a night fail.

No schema says it. Each rule yields one message for every fault.
"""

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s import objects
from tests.k8s.objects import Document, Part, label, of_kind

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MAX_NAME = {"RayCronJob": 36, "RayJob": 47, "RayCluster": 53}
"""KubeRay appends to these names and refuses longer ones."""


def endings(documents: list[Document]) -> Iterator[str]:
    """A job must end, and its cluster with it, in one of the ways that exclude each other."""
    for place, job in objects.ray_jobs(documents):
        shuts_down = job.get("shutdownAfterJobFinishes", False)
        if job.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
            yield f"{place}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
        if job.get("suspend") and not shuts_down:
            yield f"{place}: suspend needs shutdownAfterJobFinishes: true"
        strategy = job.get("deletionStrategy")
        if strategy and strategy.get("deletionRules") and shuts_down:
            yield f"{place}: deletionRules exclude shutdownAfterJobFinishes"
        if (
            strategy
            and strategy.get("deletionRules")
            and strategy.keys()
            & {
                "onSuccess",
                "onFailure",
            }
        ):
            yield f"{place}: deletionRules exclude onSuccess and onFailure"
        if not shuts_down and not strategy:
            yield f"{place}: nothing deletes the cluster; set shutdownAfterJobFinishes: true"
        for deadline in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            if not job.get(deadline, 0) > 0:
                yield f"{place}: {deadline} is {job.get(deadline)}; a hang needs a limit above 0"


def submission_modes(documents: list[Document]) -> Iterator[str]:
    """Some ways to submit exclude other fields."""
    for place, job in objects.ray_jobs(documents):
        mode, selector = job.get("submissionMode", "K8sJobMode"), job.get("clusterSelector")
        if not selector and "rayClusterSpec" not in job:
            yield f"{place}: neither rayClusterSpec nor clusterSelector"
        if job.get("backoffLimit", 0) > 0 and (selector or mode == "InteractiveMode"):
            yield f"{place}: backoffLimit excludes clusterSelector and InteractiveMode"
        if selector and (mode == "SidecarMode" or job.get("suspend")):
            yield f"{place}: clusterSelector excludes SidecarMode and suspend"
        submitter = job.get("submitterPodTemplate", {}).get("spec", {})
        if submitter and submitter.get("restartPolicy") not in ("Never", "OnFailure"):
            yield (
                f"{place}: restartPolicy of the submitter is {submitter.get('restartPolicy')}; "
                "the pod of a Job needs Never or OnFailure"
            )
        if mode == "SidecarMode":
            yield from _sidecar(place, job)


def _sidecar(place: str, job: dict[str, Any]) -> Iterator[str]:
    for field in ("submitterPodTemplate", "submitterConfig"):
        if field in job:
            yield f"{place}: SidecarMode excludes {field}"
    head = job.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {})
    policy = head.get("spec", {}).get("restartPolicy", "Never")
    if policy != "Never":
        yield f"{place}: restartPolicy of the head is {policy}; SidecarMode needs Never"


def worker_groups(documents: list[Document]) -> Iterator[str]:
    """Groups have containers, different names and sizes in order."""
    for place, cluster in objects.ray_clusters(documents):
        names = [group.get("groupName") for _, group in objects.worker_groups(cluster)]
        for name in {n for n in names if names.count(n) > 1}:
            yield f"{place}: two worker groups are called {name}"
        for name, group in objects.groups(cluster):
            if not group.get("template", {}).get("spec", {}).get("containers"):
                yield f"{place} {name}: no template with a container"
        for name, group in objects.worker_groups(cluster):
            sizes = [group.get(f) for f in ("minReplicas", "replicas", "maxReplicas")]
            if any(not isinstance(size, int) for size in sizes):
                yield f"{place} {name}: minReplicas, replicas, maxReplicas are {sizes}, not numbers"
            elif not 0 <= sizes[0] <= sizes[1] <= sizes[2]:
                yield f"{place} {name}: {sizes} are not minReplicas <= replicas <= maxReplicas"


def autoscaling(documents: list[Document]) -> Iterator[str]:
    """Autoscaler v2 restarts pods, never containers, and starts from what a job can see."""
    for place, cluster in objects.ray_clusters(documents):
        scales = cluster.get("enableInTreeAutoscaling", False)
        options = cluster.get("autoscalerOptions", {})
        if options and not scales:
            yield f"{place}: autoscalerOptions without enableInTreeAutoscaling: true"
        for name, group in objects.groups(cluster):
            pod = group.get("template", {}).get("spec", {})
            policy = pod.get("restartPolicy", "Never")
            if options.get("version") == "v2" and policy != "Never":
                yield f"{place} {name}: restartPolicy is {policy}; autoscaler v2 needs Never"
            if "idleTimeoutSeconds" in group and options.get("version") != "v2":
                yield f"{place} {name}: idleTimeoutSeconds needs autoscalerOptions.version: v2"
            env = {e.get("name") for c in pod.get("containers", []) for e in c.get("env", [])}
            if "RAY_enable_autoscaler_v2" in env:
                yield f"{place} {name}: set autoscalerOptions.version, not RAY_enable_autoscaler_v2"
        for name, group in objects.worker_groups(cluster) if scales else ():
            if _gpus(group) and group.get("minReplicas") == 0:
                yield (
                    f"{place} {name}: minReplicas is 0; jobs size their pools by the GPUs that "
                    "they find at the start, give 1 or more"
                )


def _gpus(group: dict[str, Any]) -> int:
    return sum(
        int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
        for container in objects.containers(group.get("template", {}))
    )


def gated_fields(documents: list[Document]) -> Iterator[str]:
    """Fields behind feature gates that KubeRay ships switched off."""
    for place, cluster in objects.ray_clusters(documents):
        for field in ("networkPolicy", "tlsOptions", "historyServerOptions"):
            if field in cluster:
                yield f"{place}: {field} needs a feature gate of the operator"


def names(documents: list[Document]) -> Iterator[str]:
    """Names from which longer names are made."""
    for document in of_kind(documents, *MAX_NAME):
        name, limit = document["metadata"]["name"], MAX_NAME[document["kind"]]
        if len(name) > limit or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{label(document)}: a name has at most {limit} of a-z, 0-9 and -"


def kueue(documents: list[Document]) -> Iterator[str]:
    """What Kueue's webhook refuses; a template hands its labels on to its RayJobs."""
    for document in of_kind(documents, "RayJob", "RayCronJob"):
        if QUEUE_LABEL not in document["metadata"].get("labels", {}):
            continue
        for place, job in objects.ray_jobs([document]):
            cluster = job.get("rayClusterSpec", {})
            if not job.get("shutdownAfterJobFinishes"):
                yield f"{place}: Kueue needs shutdownAfterJobFinishes: true"
            if job.get("clusterSelector"):
                yield f"{place}: Kueue refuses clusterSelector"
            if cluster.get("enableInTreeAutoscaling"):
                yield f"{place}: Kueue refuses enableInTreeAutoscaling without its own gate"
            if len(cluster.get("workerGroupSpecs", [])) > 7:
                yield f"{place}: Kueue takes at most 7 worker groups"
            if not job.get("suspend"):
                yield f"{place}: set suspend: true, or without Kueue the job runs past the quota"


def nights(documents: list[Document]) -> Iterator[str]:
    """One clock starts a night, never two nights at once, and waits long enough for its end."""
    templates = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "RayCronJob")}
    for cron in of_kind(documents, "CronJob"):
        spec, place = cron["spec"], label(cron)
        if spec.get("concurrencyPolicy") != "Forbid":
            yield f"{place}: concurrencyPolicy is {spec.get('concurrencyPolicy')}; give Forbid"
        for field in (
            "startingDeadlineSeconds",
            "timeZone",
            "successfulJobsHistoryLimit",
            "failedJobsHistoryLimit",
        ):
            if field not in spec:
                yield f"{place}: {field} is missing"
        template = templates.get(cron["metadata"]["name"])
        if template is None:
            yield f"{place}: no RayCronJob of this name to take as a template"
            continue
        if not template.get("suspend"):
            yield f"{place}: the RayCronJob of this name starts nights too; suspend it"
        for field in ("schedule", "timeZone"):
            if spec.get(field) != template.get(field):
                yield f"{place}: {field} differs from that of the RayCronJob"
        yield from _patience(place, spec, template.get("jobTemplate", {}))


def _patience(place: str, cron: dict[str, Any], job: dict[str, Any]) -> Iterator[str]:
    waits = cron["jobTemplate"]["spec"].get("activeDeadlineSeconds", 0)
    runs = job.get("activeDeadlineSeconds", 0) * (1 + job.get("backoffLimit", 0))
    if waits <= runs:
        yield f"{place}: waits {waits} s for a job that may take {runs} s"


def resources(documents: list[Document]) -> Iterator[str]:
    """Memory is what was asked for, and Ray's object store fits into /dev/shm."""
    for place, container in objects.all_containers(documents):
        asked = container.get("resources", {})
        request, limit = (asked.get(k, {}).get("memory") for k in ("requests", "limits"))
        if request is None or request != limit:
            yield f"{place}: memory asks for {request} and is limited to {limit}; make them equal"
        if "cpu" not in asked.get("requests", {}):
            yield f"{place}: no request for cpu"
    for place, cluster in objects.ray_clusters(documents):
        for name, group in objects.groups(cluster):
            yield from _shared_memory(f"{place} {name}", group.get("template", {}).get("spec", {}))


def _shared_memory(place: str, pod: dict[str, Any]) -> Iterator[str]:
    volumes = {v["name"]: v for v in pod.get("volumes", [])}
    for container in pod.get("containers", []):
        mounted = [m for m in container.get("volumeMounts", []) if m["mountPath"] == "/dev/shm"]
        volume = volumes.get(mounted[0]["name"], {}).get("emptyDir", {}) if mounted else {}
        memory = container.get("resources", {}).get("limits", {}).get("memory", "0")
        if volume.get("medium") != "Memory" or "sizeLimit" not in volume:
            yield f"{place}: no emptyDir in memory with a sizeLimit at /dev/shm"
        elif not 0.3 <= num_bytes(volume["sizeLimit"]) / max(num_bytes(memory), 1) <= 0.6:
            yield (
                f"{place}: /dev/shm has {volume['sizeLimit']} of {memory}; Ray's object store "
                "takes 30 % and counts as memory of the pod, give 30 % to 60 %"
            )


def num_bytes(quantity: str) -> float:
    """Return a Kubernetes quantity in bytes."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()
    powers = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}
    base = 1024 if unit.endswith("i") else 1000
    return float(number) * base ** powers[unit.removesuffix("i").replace("K", "k")]


def references(documents: list[Document]) -> Iterator[str]:
    """What a pod names must be among the documents. Secrets are made elsewhere."""
    known = {k: objects.names_of(documents, k) for k in ("ConfigMap", "PersistentVolumeClaim")}
    for place, pod in objects.pods(documents):
        for volume in pod.get("spec", {}).get("volumes", []):
            sources = [volume, *volume.get("projected", {}).get("sources", [])]
            wanted = [("ConfigMap", s["configMap"]["name"]) for s in sources if "configMap" in s]
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                wanted.append(("PersistentVolumeClaim", claim))
            yield from _missing(place, wanted, known)
        mounts = {v["name"] for v in pod.get("spec", {}).get("volumes", [])}
        for container in objects.containers(pod):
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in mounts:
                    yield f"{place}: mounts {mount['name']}, which is no volume of the pod"
            env = [e["valueFrom"]["configMapKeyRef"] for e in container.get("env", [])
                   if "configMapKeyRef" in e.get("valueFrom", {})]  # fmt: skip
            env += [e["configMapRef"] for e in container.get("envFrom", []) if "configMapRef" in e]
            yield from _missing(place, [("ConfigMap", e["name"]) for e in env], known)


def _missing(
    place: str, wanted: list[tuple[str, str]], known: dict[str, set[str]]
) -> Iterator[str]:
    for kind, name in wanted:
        if name not in known[kind]:
            yield f"{place}: there is no {kind} {name}; there are {sorted(known[kind])}"


def pod_monitors(documents: list[Document]) -> Iterator[str]:
    """A monitor of head and of workers, each with ports that their pods have."""
    monitors = of_kind(documents, "PodMonitor")
    node_types = []
    for monitor in monitors:
        labels = monitor["spec"]["selector"]["matchLabels"]
        node_type = labels.get("ray.io/node-type")
        node_types.append(node_type)
        for place, cluster in objects.ray_clusters(documents):
            kind = objects.worker_groups(cluster) if node_type == "worker" else ()
            for name, group in kind or [Part("head", cluster["headGroupSpec"])]:
                yield from _scraped(f"{label(monitor)} for {place} {name}", monitor, group)
    if monitors and sorted(map(str, node_types)) != ["head", "worker"]:
        yield f"PodMonitors watch ray.io/node-type {node_types}; give one for head, one for worker"


def _scraped(place: str, monitor: Document, group: dict[str, Any]) -> Iterator[str]:
    pod = group.get("template", {})
    there = {p["name"] for c in objects.containers(pod) for p in c.get("ports", [])}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        if endpoint["port"] not in there:
            yield f"{place}: no port {endpoint['port']}; there are {sorted(there)}"
        targets = {r.get("targetLabel") for r in endpoint.get("relabelings", [])}
        if "ray_io_cluster" not in targets:
            yield f"{place}: port {endpoint['port']} does not say which cluster (ray_io_cluster)"
    labels = pod.get("metadata", {}).get("labels", {})
    for key, value in monitor["spec"]["selector"]["matchLabels"].items():
        if not key.startswith("ray.io/") and labels.get(key) != value:
            yield f"{place}: pods have no label {key}: {value}"


RULES = (
    endings,
    submission_modes,
    worker_groups,
    autoscaling,
    gated_fields,
    names,
    kueue,
    nights,
    resources,
    references,
    pod_monitors,
)
