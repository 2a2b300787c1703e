"""Each fault, made in a good overlay, is found and named: what makes the rules worth having."""

import re
import shutil
from collections.abc import Callable

import pytest

from tests.k8s.objects import Document, of_kind
from tests.k8s.rendering import overlay, render
from tests.k8s.rules import violations
from tests.k8s.schemas import core_violations, needs_crds, ray_violations
from tests.processes import ROOT

Fault = Callable[[list[Document]], object]


def night(documents: list[Document]) -> dict:
    """Return the template of the night's RayJob."""
    return of_kind(documents, "RayCronJob")[0]["spec"]["jobTemplate"]


def cluster(documents: list[Document]) -> dict:
    return night(documents)["rayClusterSpec"]


def head_pod(documents: list[Document]) -> dict:
    return cluster(documents)["headGroupSpec"]["template"]["spec"]


def head(documents: list[Document]) -> dict:
    return head_pod(documents)["containers"][0]


def group(documents: list[Document], index: int = 0) -> dict:
    return cluster(documents)["workerGroupSpecs"][index]


def cron(documents: list[Document]) -> dict:
    return of_kind(documents, "CronJob")[0]["spec"]


def starter(documents: list[Document]) -> dict:
    return cron(documents)["jobTemplate"]["spec"]["template"]["spec"]


def named(documents: list[Document], kind: str, name: str) -> dict:
    return next(d for d in of_kind(documents, kind) if d["metadata"]["name"] == name)


def policy(documents: list[Document], name: str) -> dict:
    return named(documents, "NetworkPolicy", name)["spec"]


def service(kind: str) -> Document:
    return {"apiVersion": "v1", "kind": "Service", "spec": {"type": kind},
            "metadata": {"name": "ray", "namespace": "qbatch"}}  # fmt: skip


def without(value: dict, key: str) -> None:
    del value[key]


def move(value: dict, old: str, new: str) -> None:
    value[new] = value.pop(old)


KUBERAY_REFUSES: dict[str, tuple[Fault, str]] = {
    "a misspelt field": (
        lambda d: move(group(d), "maxReplicas", "maxReplica"), "'maxReplica' was unexpected"),
    "a misspelt field deep in a pod": (
        lambda d: move(head(d), "volumeMounts", "volumeMount"), "'volumeMount' was unexpected"),
    "a string for a number": (
        lambda d: group(d).update(maxReplicas="8"), "maxReplicas: '8' is not of type 'integer'"),
    "a group without template": (
        lambda d: without(group(d), "template"), "'template' is a required property"),
    "no head": (
        lambda d: without(cluster(d), "headGroupSpec"), "'headGroupSpec' is a required property"),
    "an unknown mode": (
        lambda d: cluster(d)["authOptions"].update(mode="password"), "'password' is not one of"),
    "a concurrency policy for a RayCronJob": (
        lambda d: of_kind(d, "RayCronJob")[0]["spec"].update(concurrencyPolicy="Forbid"),
        "'concurrencyPolicy' was unexpected"),
}  # fmt: skip

KUBERNETES_REFUSES: dict[str, tuple[Fault, str]] = {
    "a misspelt field": (
        lambda d: move(cron(d), "concurrencyPolicy", "concurrency"), "'concurrency' was unexp"),
    "a string for a number": (
        lambda d: cron(d).update(startingDeadlineSeconds="4h"), "'4h' is not of type 'integer'"),
    "a policy without selector": (
        lambda d: without(policy(d, "qbatch-dns")["egress"][0]["ports"][0], "port")
        or policy(d, "qbatch-dns").update(podSelectr={}), "'podSelectr' was unexpected"),
    "a monitor of an unknown field": (
        lambda d: of_kind(d, "PodMonitor")[0]["spec"].update(endpoints=[]),
        "'endpoints' was unexpected"),
}  # fmt: skip

THE_OPERATOR_REFUSES: dict[str, tuple[Fault, str]] = {
    "a time to live without shutdown": (
        lambda d: without(night(d), "shutdownAfterJobFinishes"),
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
    "suspended without shutdown": (
        lambda d: night(d).update(suspend=True, shutdownAfterJobFinishes=False),
        "suspend needs shutdownAfterJobFinishes"),
    "two ways to delete": (
        lambda d: night(d).update(deletionStrategy={"deletionRules": [{"policy": "DeleteSelf"}]}),
        "deletionRules exclude shutdownAfterJobFinishes"),
    "rules beside the legacy policies": (
        lambda d: night(d).update(deletionStrategy={"deletionRules": [{}], "onSuccess": {}}),
        "deletionRules exclude onSuccess"),
    "no way to delete": (
        lambda d: night(d).update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0),
        "nothing deletes the cluster"),
    "retries on a foreign cluster": (
        lambda d: night(d).update(clusterSelector={"ray.io/cluster": "x"}),
        "backoffLimit excludes clusterSelector"),
    "retries of a person": (
        lambda d: night(d).update(submissionMode="InteractiveMode"),
        "backoffLimit excludes clusterSelector and InteractiveMode"),
    "a sidecar with a submitter": (
        lambda d: night(d).update(submissionMode="SidecarMode"),
        "SidecarMode excludes submitterPodTemplate"),
    "a sidecar that restarts": (
        lambda d: (night(d).update(submissionMode="SidecarMode"),
                   head_pod(d).update(restartPolicy="Always")), "SidecarMode needs Never"),
    "a submitter that restarts for ever": (
        lambda d: without(night(d)["submitterPodTemplate"]["spec"], "restartPolicy"),
        "submitter is None; the pod of a Job needs Never or OnFailure"),
    "no cluster": (
        lambda d: without(night(d), "rayClusterSpec"), "neither rayClusterSpec nor"),
    "two groups of one name": (
        lambda d: group(d).update(groupName="gpu"), "two worker groups are called gpu"),
    "sizes out of order": (
        lambda d: group(d).update(minReplicas=20), "not minReplicas <= replicas <= maxReplicas"),
    "a head without containers": (
        lambda d: without(head_pod(d), "containers"), "head: no template with a container"),
    "autoscaler v2 with restarts": (
        lambda d: group(d)["template"]["spec"].update(restartPolicy="Always"),
        "group cpu: restartPolicy is Always; autoscaler v2 needs Never"),
    "options of an autoscaler that is off": (
        lambda d: cluster(d).update(enableInTreeAutoscaling=False), "autoscalerOptions without"),
    "v2 by variable as well": (
        lambda d: head(d).update(env=[{"name": "RAY_enable_autoscaler_v2", "value": "1"}]),
        "not RAY_enable_autoscaler_v2"),
    "a group's idle time under v1": (
        lambda d: (group(d).update(idleTimeoutSeconds=60),
                   cluster(d)["autoscalerOptions"].update(version="v1")),
        "idleTimeoutSeconds needs autoscalerOptions.version: v2"),
    "a field behind a gate": (
        lambda d: cluster(d).update(networkPolicy={"mode": "DenyAll"}),
        "networkPolicy needs a feature gate"),
    "a long name": (
        lambda d: of_kind(d, "RayCronJob")[0]["metadata"].update(name="q" * 37), "at most 36"),
    "tokens of the API server": (
        lambda d: cluster(d)["authOptions"].update(enableK8sTokenAuth=True), "not for RayJobs"),
    "tokens of an old Ray": (
        lambda d: cluster(d).update(rayVersion="2.51.1"), "'2.51.1'; tokens need 2.52"),
    "tokens of an unknown Ray": (
        lambda d: without(cluster(d), "rayVersion"), "''; tokens need 2.52"),
}  # fmt: skip

A_NIGHT_WOULD_FAIL: dict[str, tuple[Fault, str]] = {
    "no limit of time": (
        lambda d: without(night(d), "activeDeadlineSeconds"), "activeDeadlineSeconds is None"),
    "two nights at once": (
        lambda d: cron(d).update(concurrencyPolicy="Allow"), "is Allow; give Forbid"),
    "no starting deadline": (
        lambda d: without(cron(d), "startingDeadlineSeconds"), "DeadlineSeconds is missing"),
    "two clocks": (
        lambda d: of_kind(d, "RayCronJob")[0]["spec"].update(suspend=False),
        "starts nights too; suspend it"),
    "clocks that differ": (
        lambda d: cron(d).update(schedule="30 1 * * *"), "schedule differs"),
    "no template": (
        lambda d: d.remove(of_kind(d, "RayCronJob")[0]), "no RayCronJob of this name"),
    "less patience than the job has time": (
        lambda d: night(d).update(backoffLimit=2), "waits 82800 s for .* take 108000 s"),
    "GPUs that a job cannot see at its start": (
        lambda d: group(d, 1).update(minReplicas=0), "group gpu: minReplicas is 0"),
    "memory beyond the request": (
        lambda d: head(d)["resources"]["limits"].update(memory="32Gi"),
        "memory asks for 16Gi and is limited to 32Gi"),
    "no memory for objects": (
        lambda d: head(d)["volumeMounts"].pop(), "head: no emptyDir in memory .* at /dev/shm"),
    "less memory for objects than Ray takes": (
        lambda d: head_pod(d)["volumes"][2]["emptyDir"].update(sizeLimit="1Gi"),
        "/dev/shm has 1Gi of 16Gi"),
    "a ConfigMap that is not there": (
        lambda d: head_pod(d)["volumes"][0]["configMap"].update(name="qbatch-night-config"),
        "there is no ConfigMap qbatch-night-config"),
    "a mount of no volume": (
        lambda d: head_pod(d)["volumes"].pop(1), "mounts tmp, which is no volume"),
    "a claim that is not there": (
        lambda d: head_pod(d)["volumes"].append(
            {"name": "m", "persistentVolumeClaim": {"claimName": "models"}}),
        "there is no PersistentVolumeClaim models"),
    "a variable from a ConfigMap that is not there": (
        lambda d: head(d).update(envFrom=[{"configMapRef": {"name": "settings"}}]),
        "there is no ConfigMap settings"),
    "an account that is not there": (
        lambda d: head_pod(d).update(serviceAccountName="ray"), "there is no ServiceAccount ray"),
    "a starter that may not create": (
        lambda d: named(d, "Role", "qbatch-starter")["rules"][1]["verbs"].remove("create"),
        "qbatch-starter: may not create rayjobs"),
    "a starter bound to nothing": (
        lambda d: d.remove(named(d, "RoleBinding", "qbatch-starter")),
        "may not get raycronjobs/qbatch-night"),
    "a starter of another namespace": (
        lambda d: named(d, "RoleBinding", "qbatch-starter")["subjects"][0].update(namespace="x"),
        "may not get raycronjobs/qbatch-night"),
    "a starter without token": (
        lambda d: starter(d).update(automountServiceAccountToken=False), "CronJob/.*: has no tok"),
    "an autoscaler without token": (
        lambda d: head_pod(d).update(automountServiceAccountToken=False), "a token, give True"),
    "monitors of heads only": (
        lambda d: d.remove(named(d, "PodMonitor", "qbatch-worker")), "one for head, one for"),
    "a port that pods do not have": (
        lambda d: head(d)["ports"].pop(), "no port dash-metrics"),
    "metrics of no cluster": (
        lambda d: without(of_kind(d, "PodMonitor")[0]["spec"]["podMetricsEndpoints"][0],
                          "relabelings"), "does not say which cluster"),
    "a pod that no policy lets out": (
        lambda d: group(d)["template"]["metadata"].update(labels={}), "no NetworkPolicy lets it"),
    "another namespace": (
        lambda d: of_kind(d, "ConfigMap")[0]["metadata"].update(namespace="default"),
        "namespace is default"),
}  # fmt: skip

KUEUE_REFUSES: dict[str, tuple[Fault, str]] = {
    "autoscaling": (
        lambda d: cluster(d).update(enableInTreeAutoscaling=True), "refuses enableInTreeAuto"),
    "a cluster that stays": (
        lambda d: night(d).update(shutdownAfterJobFinishes=False), "Kueue needs shutdownAfter"),
    "a foreign cluster": (
        lambda d: night(d).update(clusterSelector={"ray.io/cluster": "x"}), "Kueue refuses clust"),
    "eight groups": (
        lambda d: cluster(d).update(workerGroupSpecs=[group(d)] * 8), "at most 7 worker groups"),
    "a start past the quota": (lambda d: without(night(d), "suspend"), "set suspend: true"),
}  # fmt: skip

UNSAFE: dict[str, tuple[Fault, str]] = {
    "a LoadBalancer": (
        lambda d: cluster(d)["headGroupSpec"].update(serviceType="LoadBalancer"),
        "Service of type LoadBalancer; give ClusterIP"),
    "a NodePort by the other field": (
        lambda d: cluster(d)["headGroupSpec"].update(headService={"spec": {"type": "NodePort"}}),
        "Service of type NodePort"),
    "a LoadBalancer of its own": (
        lambda d: d.append(service("LoadBalancer")), "Service/ray: Service of type LoadBalancer"),
    "an Ingress": (
        lambda d: d.append(service("ClusterIP") | {"kind": "Ingress"}), "exposes the cluster"),
    "an Ingress by the operator": (
        lambda d: cluster(d)["headGroupSpec"].update(enableIngress=True), "an Ingress for"),
    "no token": (lambda d: without(cluster(d), "authOptions"), "mode is None; give token"),
    "tokens switched off": (
        lambda d: cluster(d)["authOptions"].update(mode="disabled"), "is disabled; give token"),
    "a secret in a variable": (
        lambda d: head(d).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "wJalrXUtnFEMI"}]),
        "AWS_SECRET_ACCESS_KEY as plain text"),
    "a secret in the autoscaler": (
        lambda d: cluster(d)["autoscalerOptions"].update(env=[{"name": "HF_TOKEN", "value": "x"}]),
        "autoscaler: HF_TOKEN as plain text"),
    "a secret in the runtime environment": (
        lambda d: night(d).update(runtimeEnvYAML="env_vars:\n  HF_TOKEN: abc\n"),
        "runtimeEnvYAML: HF_TOKEN as plain text"),
    "a secret on the command line": (
        lambda d: night(d).update(entrypoint="python jobs/embed_corpus.py --api-key abc"),
        "entrypoint: api-key as plain text"),
    "a secret in the config": (
        lambda d: next(c for c in of_kind(d, "ConfigMap") if "night.toml" in c["data"])
        ["data"].update({"night.toml": "[corpus]\npassword = 'abc'\n"}),
        "night.toml: password as plain text"),
    "a key by its look": (
        lambda d: of_kind(d, "ServiceAccount")[0]["metadata"].update(
            annotations={"note": "AKIA" + "ABCDEFGHIJKLMNOP"}), "an AWS key at metadata.anno"),
    "a password in a URI": (
        lambda d: night(d).update(entrypoint="python x.py s3://me:pass@bucket/"),
        "a password in a URI at spec.jobTemplate.entrypoint"),
    "a Secret": (
        lambda d: d.append(service("x") | {"kind": "Secret"}), "a Secret does not belong"),
    "the latest image": (
        lambda d: head(d).update(image="registry.example.com:5000/qbatch:latest"), "is not pinned"),
    "an image of no version": (
        lambda d: starter(d)["containers"][0].update(image="registry.example.com:5000/qbatch"),
        "is not pinned"),
    "root": (
        lambda d: without(head_pod(d)["securityContext"], "runAsNonRoot"), "may run as root"),
    "root in one container": (
        lambda d: head(d)["securityContext"].update(runAsUser=0), "privileged or root"),
    "a privileged container": (
        lambda d: head(d)["securityContext"].update(privileged=True), "privileged or root"),
    "privileges to gain": (
        lambda d: without(head(d)["securityContext"], "allowPrivilegeEscalation"),
        "set allowPrivilegeEscalation: false"),
    "privileges of the autoscaler": (
        lambda d: without(cluster(d)["autoscalerOptions"], "securityContext"),
        "autoscaler: drop ALL capabilities"),
    "capabilities": (
        lambda d: head(d)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        "drop ALL capabilities and add none"),
    "system calls": (
        lambda d: without(head_pod(d)["securityContext"], "seccompProfile"), "no seccompProfile"),
    "the host's network": (lambda d: head_pod(d).update(hostNetwork=True), "head: hostNetwork"),
    "the host's files": (
        lambda d: head_pod(d)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "head: hostPath /"),
    "a port of the host": (lambda d: head(d)["ports"][1].update(hostPort=8265), "hostPort"),
    "a namespace that allows everything": (
        lambda d: of_kind(d, "Namespace")[0]["metadata"].update(labels={}), "enforce: restricted"),
    "a worker with a token of Kubernetes": (
        lambda d: group(d)["template"]["spec"].update(automountServiceAccountToken=True),
        "group cpu: automountServiceAccountToken is True"),
    "a submitter with the default account": (
        lambda d: without(night(d)["submitterPodTemplate"]["spec"], "automountServiceAccountToken"),
        "submitter: no serviceAccountName"),
    "rights that nobody needs": (
        lambda d: named(d, "Role", "qbatch-starter")["rules"][1]["verbs"].append("delete"),
        "may delete rayjobs and need not"),
    "rights over all templates": (
        lambda d: without(named(d, "Role", "qbatch-starter")["rules"][0], "resourceNames"),
        "may get raycronjobs and need not"),
    "rights over the cluster": (
        lambda d: named(d, "RoleBinding", "qbatch-starter").update(kind="ClusterRoleBinding"),
        "rights beyond the namespace"),
    "nothing closed": (
        lambda d: d.remove(named(d, "NetworkPolicy", "qbatch-default-deny")),
        "no NetworkPolicy that closes"),
    "cloud metadata": (
        lambda d: without(policy(d, "qbatch-storage")["egress"][0]["to"][0]["ipBlock"], "except"),
        r"0\.0\.0\.0/0 lets pods ask cloud metadata at 169\.254\.169\.254"),
    "cloud metadata over IPv6": (
        lambda d: policy(d, "qbatch-storage")["egress"][0]["to"][1]["ipBlock"]["except"].pop(),
        "cloud metadata at fd00:ec2::254"),
    "every address": (
        lambda d: without(policy(d, "qbatch-storage")["egress"][0], "to"), "open to every address"),
    "a dashboard for everybody": (
        lambda d: policy(d, "qbatch-dashboard")["ingress"][0]["from"].append(
            {"namespaceSelector": {}}), "open to everybody"),
}  # fmt: skip


def faults(table: dict[str, tuple[Fault, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("fault", "message"), [pytest.param(*case, id=name) for name, case in table.items()]
    )


def assert_named(found: list[str], message: str) -> None:
    assert any(re.search(message, m) for m in found), f"{message!r} is not among {found}"


@needs_crds
@faults(KUBERAY_REFUSES)
def test_the_schema_of_kuberay_finds_it(fault, message):
    documents = overlay("production")
    fault(documents)
    assert_named(list(ray_violations(documents)), message)


@faults(KUBERNETES_REFUSES)
def test_the_schema_of_kubernetes_finds_it(fault, message):
    documents = overlay("production")
    fault(documents)
    assert_named(list(core_violations(documents)), message)


@faults(THE_OPERATOR_REFUSES | A_NIGHT_WOULD_FAIL | UNSAFE)
def test_a_rule_finds_it(fault, message):
    documents = overlay("production")
    fault(documents)
    assert_named(violations(documents), message)


@faults(KUEUE_REFUSES)
def test_a_rule_finds_what_kueue_refuses(fault, message):
    documents = overlay("kueue")
    fault(documents)
    assert_named(violations(documents), message)


@pytest.fixture
def merged(tmp_path) -> list[Document]:
    """Production with one group made larger by a strategic merge, which replaces the whole list."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    folder = tmp_path / "k8s" / "overlays" / "merged"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text("""
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: qbatch
resources: [../production]
patches:
  - patch: |-
      apiVersion: ray.io/v1
      kind: RayCronJob
      metadata: {name: qbatch-night}
      spec:
        jobTemplate:
          rayClusterSpec:
            workerGroupSpecs:
              - {groupName: gpu, replicas: 4, minReplicas: 4, maxReplicas: 4}
""")
    return render(folder)


@needs_crds
def test_the_schema_finds_what_a_strategic_merge_dropped(merged):
    assert_named(list(ray_violations(merged)), "'template' is a required property")


def test_a_rule_finds_what_a_strategic_merge_dropped(merged):
    assert_named(violations(merged), "group gpu: no template with a container")
