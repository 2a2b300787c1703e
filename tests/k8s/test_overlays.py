"""Every overlay renders, satisfies the API server and the rules, and does what its name says."""

import re
import runpy
import tomllib

import pytest

from qbatch.cli import parse
from qbatch.pipelines.reindex import ReindexConfig
from tests.k8s import objects
from tests.k8s.objects import Document, of_kind
from tests.k8s.rendering import OVERLAYS, overlay
from tests.k8s.rules import violations
from tests.k8s.schemas import core_violations, needs_crds, ray_violations
from tests.processes import ROOT

every_overlay = pytest.mark.parametrize("name", sorted(p.name for p in OVERLAYS.iterdir()))


@every_overlay
def test_kubernetes_accepts_it(name):
    assert list(core_violations(overlay(name))) == []


@needs_crds
@every_overlay
def test_kuberay_accepts_it(name):
    documents = overlay(name)
    assert of_kind(documents, "RayCronJob")
    assert list(ray_violations(documents)) == []


@every_overlay
def test_it_holds_every_rule(name):
    assert violations(overlay(name)) == []


@every_overlay
def test_it_runs_the_tested_ray(name):
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    versions = {c.value["rayVersion"] for c in objects.ray_clusters(overlay(name))}
    assert versions == {pinned}


@every_overlay
def test_one_image_for_everything(name):
    containers = [c for _, c in objects.all_containers(overlay(name)) if "image" in c]
    assert len(containers) >= 4
    assert len({c["image"] for c in containers}) == 1


@every_overlay
def test_the_entrypoint_reads_the_mounted_config(name):
    documents = overlay(name)
    (job,) = (j.value for j in objects.ray_jobs(documents))
    assert job["entrypoint"] == "python jobs/reindex.py --config /etc/qbatch/night.toml"
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]
    (head,) = objects.containers(pod)
    mount = next(m for m in head["volumeMounts"] if m["mountPath"] == "/etc/qbatch")
    assert mount["readOnly"]
    assert mount["name"] in {v["name"] for v in pod["spec"]["volumes"] if "configMap" in v}
    assert night_config(documents)["embed"]["input"].startswith("s3://")


@every_overlay
def test_the_entrypoint_takes_the_mounted_config(name, tmp_path):
    documents = overlay(name)
    for _, job in objects.ray_jobs(documents):
        assert (ROOT / job["entrypoint"].split()[1]).is_file()
    file = tmp_path / "night.toml"
    file.write_text(night_toml(documents), encoding="utf-8")
    config = parse(ReindexConfig, ["--config", str(file)])
    assert config.precomputed == ["answers"]
    assert config.publish.wait_s > config.publish.lease_s


def test_dev_needs_no_gpu_and_starts_nothing_by_itself():
    documents = overlay("dev")
    assert gpu_groups(documents) == []
    (cron,) = of_kind(documents, "CronJob")
    assert cron["spec"]["suspend"] is True
    assert objects.names_of(documents, "RayCluster") == {"qbatch-dev"}


def test_production_scales_gpus_on_their_own_nodes():
    documents = overlay("production")
    (cluster,) = (c.value for c in objects.ray_clusters(documents))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert [g["groupName"] for g in cluster["workerGroupSpecs"]] == ["cpu", "gpu"]
    (gpu,) = gpu_groups(documents)
    pod = gpu["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [t["key"] for t in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert gpu["maxReplicas"] > gpu["minReplicas"]
    embed = night_config(documents)["embed"]
    assert (embed["gpus_per_actor"], embed["max_actors"]) == (1, gpu["maxReplicas"])


def test_production_binds_storage_to_accounts_of_ray_only():
    bound = {
        d["metadata"]["name"]
        for d in of_kind(overlay("production"), "ServiceAccount")
        if "eks.amazonaws.com/role-arn" in d["metadata"].get("annotations", {})
    }
    assert bound == {"qbatch-head", "qbatch-worker"}


def test_kueue_queues_a_night_of_fixed_size():
    documents = overlay("kueue")
    (night,) = of_kind(documents, "RayCronJob")
    assert "kueue.x-k8s.io/queue-name" in night["metadata"]["labels"]
    (cluster,) = (c.value for c in objects.ray_clusters(documents))
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    (gpu,) = gpu_groups(documents)
    assert night_config(documents)["embed"]["max_actors"] == gpu["replicas"]


def test_raycronjob_leaves_nothing_of_the_starter():
    documents = overlay("raycronjob")
    (night,) = of_kind(documents, "RayCronJob")
    assert night["spec"]["suspend"] is False
    assert of_kind(documents, "CronJob", "Role", "RoleBinding") == []
    assert objects.names_of(documents, "ServiceAccount") == {"qbatch-head", "qbatch-worker"}
    names = objects.names_of(documents, "ConfigMap") - {"qbatch-dashboard"}
    assert [name.startswith("qbatch-night-config-") for name in names] == [True]


@pytest.mark.parametrize("name", ["dev", "production", "kueue"])
def test_another_pod_starts_only_where_the_script_says_that_it_may_help(name):
    script = runpy.run_path(str(ROOT / "k8s" / "base" / "start_night.py"))
    (cron,) = of_kind(overlay(name), "CronJob")
    ignored, failed = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert failed["onExitCodes"]["operator"] == "NotIn"
    killed = [128 + 9, 128 + 15]
    assert failed["onExitCodes"]["values"] == [script["TRY_AGAIN"], *killed]


def gpu_groups(documents: list[Document]) -> list[dict]:
    return [
        group
        for _, cluster in objects.ray_clusters(documents)
        for _, group in objects.worker_groups(cluster)
        for container in objects.containers(group["template"])
        if "nvidia.com/gpu" in container["resources"]["limits"]
    ]


def night_config(documents: list[Document]) -> dict:
    return tomllib.loads(night_toml(documents))


def night_toml(documents: list[Document]) -> str:
    (text,) = (
        d["data"]["night.toml"]
        for d in of_kind(documents, "ConfigMap")
        if "night.toml" in d["data"]
    )
    return text
