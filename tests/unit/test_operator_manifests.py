"""What the operator makes of an app: golden manifests, one per kind and sample, and what must hold for all.

After a wanted change: ``GOLDEN=write pytest tests/unit/test_operator_manifests.py``, and read the difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from drumline.api.v1alpha1 import DistributedApp, MachineTypeSpec
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError
from drumline_operator.diff import first_difference
from drumline_operator.manifests import deployment, labels, networkpolicy, pdb, pod, service
from drumline_operator.manifests.context import Context
from drumline_operator.manifests.merge import merge
from drumline_operator.manifests.names import INPUTS, RENDERED_BY, TEMPLATE
from drumline_operator.settings import OperatorSettings

GOLDEN = Path(__file__).parents[1] / "data" / "operator"
SETTINGS = OperatorSettings(version="0.1.0")
MACHINE = MachineTypeSpec.model_validate(
    {
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "runtimeClassName": "nvidia",
        "sharedMemorySizePerGPU": "4Gi",
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "HF_HUB_OFFLINE", "value": "1"}],
    }
)


def context(machine: MachineTypeSpec | None = None, settings: OperatorSettings = SETTINGS, **spec: Any) -> Context:
    document = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "sdxl", "namespace": "ml"},
        "spec": {"image": "ghcr.io/acme/sdxl:1.0", "workerClass": "app:SDXLWorker", **spec},
    }
    return Context(DistributedApp.model_validate(document, by_name=False), "uid-1", settings, machine)


SAMPLES: dict[str, Context] = {
    "minimal": context(),
    "h100": context(
        MACHINE,
        numGPUs=8,
        machineType="GPU-H100",
        replicas=2,
        setupArgs={"model": "sdxl"},
        warmupPayload={"prompt": "x"},
        resources={"requests": {"memory": "64Gi"}, "limits": {"memory": "128Gi"}},
        env=[{"name": "HF_HUB_OFFLINE", "value": "0"}, {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "t"}}}],
        envFrom=[{"configMapRef": {"name": "more"}}],
        modelCache={"claimName": "weights", "mountPath": "/models", "compileCachePath": "/compiled"},
        imagePullSecrets=[{"name": "registry"}],
        serving={"auth": {"type": "APIKey", "secretRef": {"name": "keys"}}},
        networkPolicy="DenyAllIngress",
    ),
    "git": context(
        numGPUs=0,
        worldSize=2,
        source={"git": {"url": "https://x/y", "revision": "v1", "path": "src/", "secretRef": {"name": "login"}}},
        podTemplate={
            "metadata": {"labels": {"team": "a", labels.APP: "not mine"}},
            "spec": {
                "priorityClassName": "high",
                "containers": [
                    {"name": "worker", "env": [{"name": "A", "value": "b"}]},
                    {"name": "side", "image": "s"},
                ],
            },
        },
    ),
}
BUILDERS = {
    "deployment": deployment.build,
    "service": service.build,
    "pdb": pdb.build,
    "networkpolicy": networkpolicy.build,
}


def worker(built: dict[str, Any]) -> dict[str, Any]:
    (found,) = [each for each in built["spec"]["containers"] if each["name"] == "worker"]
    return found


def environment(built: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in worker(built)["env"] if "value" in each}


@pytest.mark.parametrize("sample", sorted(SAMPLES))
@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_golden(kind: str, sample: str) -> None:
    built = BUILDERS[kind](SAMPLES[sample])
    path = GOLDEN / f"{kind}-{sample}.yaml"
    if built is None:
        assert not path.exists()
        return
    text = yaml.safe_dump(built, sort_keys=False, width=120)
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(text)


@pytest.mark.parametrize("sample", sorted(SAMPLES))
def test_the_container_reads_what_the_operator_wrote(sample: str) -> None:
    one = SAMPLES[sample]
    settings = RunnerSettings.from_env(environment(pod.build(one)))
    assert settings == pod.runner_settings(one)
    assert (settings.target, settings.app_id, settings.host) == ("app:SDXLWorker", "ml/sdxl", "0.0.0.0")
    assert settings.revision == one.revision == pod.build(one)["metadata"]["labels"][labels.REVISION]


@pytest.mark.parametrize("sample", sorted(SAMPLES))
def test_pods_pass_the_restricted_standard(sample: str) -> None:
    built = pod.build(SAMPLES[sample])["spec"]
    assert built["securityContext"]["runAsNonRoot"] is True
    assert built["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in [*built.get("initContainers", ()), worker({"spec": built})]:
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    allowed = {"emptyDir", "configMap", "persistentVolumeClaim", "secret"}
    assert all(set(volume) - {"name"} <= allowed for volume in built["volumes"])
    assert {mount["name"] for mount in worker({"spec": built})["volumeMounts"]} <= {v["name"] for v in built["volumes"]}


def test_selectors_find_the_pods() -> None:
    one = SAMPLES["git"]
    found = pod.build(one)["metadata"]["labels"].items()
    assert {"team": "a"}.items() <= found
    for selector in (
        service.build(one)["spec"]["selector"],
        pdb.build(one)["spec"]["selector"]["matchLabels"],
        deployment.build(one)["spec"]["selector"]["matchLabels"],
        networkpolicy.build(SAMPLES["h100"])["spec"]["podSelector"]["matchLabels"],  # type: ignore[index]
    ):
        assert selector.items() <= found


def test_the_app_wins_over_its_machine() -> None:
    found = environment(pod.build(SAMPLES["h100"]))
    assert (found["HF_HUB_OFFLINE"], found["NCCL_DEBUG"]) == ("0", "WARN")
    ours = context(env=[{"name": "XDG_CACHE_HOME", "value": "/else"}, {"name": "DRUMLINE_LOG_FORMAT", "value": "text"}])
    found = environment(pod.build(ours))
    assert (found["XDG_CACHE_HOME"], found["DRUMLINE_LOG_FORMAT"]) == ("/else", "text")


@pytest.mark.parametrize(
    ("machine", "spec", "size"),
    [
        (None, {}, "8Gi"),
        (None, {"numGPUs": 0}, "1Gi"),
        (MACHINE, {"numGPUs": 4}, "16Gi"),
        (MACHINE, {"numGPUs": 0}, "1Gi"),
        (MACHINE, {"sharedMemorySize": 1024}, "1024"),
        (MachineTypeSpec(shared_memory_size_per_gpu="1.5Gi"), {"numGPUs": 2}, str(3 << 30)),
    ],
)
def test_shared_memory(machine: MachineTypeSpec | None, spec: dict[str, Any], size: str) -> None:
    volumes = {each["name"]: each for each in pod.build(context(machine, **spec))["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


def test_no_shared_memory() -> None:
    built = pod.build(context(sharedMemorySize="0"))["spec"]
    assert "shm" not in {each["name"] for each in built["volumes"]}
    assert "/dev/shm" not in {each["mountPath"] for each in built["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        ({}, {"nvidia.com/gpu": 1}),
        ({"numGPUs": 0, "resources": {"limits": {"memory": "1Gi"}}}, {"memory": "1Gi"}),
        ({"gpu": {"resourceName": "nvidia.com/mig-1g.10gb"}, "numGPUs": 2}, {"nvidia.com/mig-1g.10gb": 2}),
    ],
)
def test_gpu_limits(spec: dict[str, Any], limits: dict[str, Any]) -> None:
    assert worker(pod.build(context(**spec)))["resources"] == {"limits": limits}


def test_claimed_gpus() -> None:
    built = pod.build(context(gpu={"allocation": "ResourceClaim", "resourceClaimTemplateName": "four"}, numGPUs=4))
    assert built["spec"]["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "four"}]
    assert worker(built)["resources"] == {"claims": [{"name": "gpus"}]}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({}, (0, 1)),
        ({"numGPUs": 0}, (1, 0)),
        ({"rollout": {"maxSurge": 1}}, (1, 0)),
        ({"rollout": {"maxUnavailable": 0}}, (1, 0)),
        ({"rollout": {"maxUnavailable": "50%"}}, (0, "50%")),
        ({"rollout": {"maxSurge": "0%"}}, ("0%", 1)),
        ({"numGPUs": 0, "rollout": {"maxSurge": 2, "maxUnavailable": 2}}, (2, 2)),
    ],
)
def test_how_pods_are_replaced(spec: dict[str, Any], wanted: tuple[Any, Any]) -> None:
    rolling = deployment.strategy(context(**spec).app.spec)["rollingUpdate"]
    assert (rolling["maxSurge"], rolling["maxUnavailable"]) == wanted
    assert deployment.strategy(context(rollout={"type": "Recreate"}).app.spec) == {"type": "Recreate"}


def test_times_reach_the_pod() -> None:
    built = pod.build(
        context(rollout={"drainTimeoutSeconds": 100}, serving={"startupTimeoutSeconds": 600, "port": 9000})
    )
    # The drain, the delay before it, and 30 s for teardown().
    assert built["spec"]["terminationGracePeriodSeconds"] == 133
    probe = worker(built)["startupProbe"]
    assert 600 < probe["failureThreshold"] * probe["periodSeconds"] <= 700
    assert worker(built)["ports"] == [{"name": "http", "containerPort": 9000}]


def test_the_container_that_fetches_code_fits_a_quota_and_the_pull_policy() -> None:
    amounts = {"limits": {"memory": "8Gi"}, "requests": {"cpu": "1"}}
    git = {"git": {"url": "https://x/y", "revision": "v1"}}
    (fetch,) = pod.build(context(source=git, resources=amounts, imagePullPolicy="Never"))["spec"]["initContainers"]
    assert (fetch["resources"], fetch["imagePullPolicy"]) == (amounts, "Never")
    apart = OperatorSettings(git_image="git:1")
    (fetch,) = pod.build(context(settings=apart, source=git, imagePullPolicy="Never"))["spec"]["initContainers"]
    assert "imagePullPolicy" not in fetch  # it is about the app's image


def test_suspended_apps_have_no_pods_but_keep_their_template() -> None:
    awake, asleep = deployment.build(context(replicas=3)), deployment.build(context(replicas=3, suspend=True))
    assert (awake["spec"]["replicas"], asleep["spec"]["replicas"]) == (3, 0)
    assert awake["spec"]["template"] == asleep["spec"]["template"]


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match="DRUMLINE_LOG_LEVEL"):
        deployment.build(context(env=[{"name": "DRUMLINE_LOG_LEVEL", "value": "loud"}]))


@pytest.mark.parametrize(
    "spec", [{"replicas": 5}, {"suspend": True}, {"networkPolicy": "DenyAllIngress"}, {"rollout": {"maxSurge": 1}}]
)
def test_what_changes_no_pod(spec: dict[str, Any]) -> None:
    assert context(**spec).revision == context().revision


@pytest.mark.parametrize(
    "spec", [{"image": "other"}, {"numGPUs": 2}, {"setupArgs": {"a": 1}}, {"rollout": {"drainTimeoutSeconds": 1}}]
)
def test_what_changes_pods(spec: dict[str, Any]) -> None:
    assert context(**spec).revision != context().revision


def test_a_new_operator_restarts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    live = deployment.build(context())
    newer = OperatorSettings(version="9.0.0")
    fetch = pod.build
    monkeypatch.setattr(pod, "build", lambda one: merge(fetch(one), {"spec": {"hostname": "new"}}))
    kept = deployment.build(context(settings=newer), live)
    assert first_difference(kept, live) is None
    assert kept["metadata"]["annotations"][RENDERED_BY] == "0.1.0"
    # The next change of the app takes the new version's pods along.
    changed = deployment.build(context(settings=newer, image="a:2"), live)
    assert changed["spec"]["template"]["spec"]["hostname"] == "new"
    assert changed["metadata"]["annotations"][RENDERED_BY] == "9.0.0"


@pytest.mark.parametrize("name", [INPUTS, TEMPLATE])
def test_a_template_that_somebody_edited_is_made_anew(name: str) -> None:
    live = deployment.build(context())
    edited = json.loads(json.dumps(live))
    edited["metadata"]["annotations"][name] = edited["metadata"]["annotations"][name].replace("a", "b")
    assert deployment.build(context(), edited) == live
    assert name in (first_difference(live, edited) or "")


@pytest.mark.parametrize(
    ("base", "patch", "merged"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"args": [1, 2]}, {"args": [3]}, {"args": [3]}),
        (
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
            {"env": [{"name": "A", "valueFrom": {}}, {"name": "C", "value": "3"}]},
            {"env": [{"name": "A", "valueFrom": {}}, {"name": "B", "value": "2"}, {"name": "C", "value": "3"}]},
        ),
        (
            {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]},
            {"volumes": [{"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}}]},
            {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]},
        ),
        (
            {"containers": [{"name": "worker", "image": "a"}]},
            {"containers": [{"name": "side"}]},
            {"containers": [{"name": "worker", "image": "a"}, {"name": "side"}]},
        ),
    ],
)
def test_strategic_merge(base: dict[str, Any], patch: dict[str, Any], merged: dict[str, Any]) -> None:
    before = json.dumps([base, patch])
    assert merge(base, patch) == merged
    assert json.dumps([base, patch]) == before


@pytest.mark.parametrize(
    ("wanted", "found", "words"),
    [
        ({"spec": {"a": 1}}, {"spec": {"a": 1, "default": 2}}, None),
        ({"spec": {"a": ""}}, {"spec": {}}, None),
        ({"spec": {"a": []}}, {"spec": {}}, None),
        ({"spec": {"labels": {}}}, {"spec": {}}, None),
        ({"spec": {"hostPID": False}}, {"spec": {}}, None),
        ({"spec": {"initialDelaySeconds": 0}}, {"spec": {}}, None),
        ({"spec": {"hostPID": False}}, {"spec": {"hostPID": True}}, "spec.hostPID: True -> False"),
        ({"spec": {"hostUsers": False}}, {"spec": {}}, "spec.hostUsers: nothing -> False"),
        ({"spec": {"runAsUser": 0}}, {"spec": {}}, "spec.runAsUser: nothing -> 0"),
        ({"spec": {"podSelector": {}}}, {"spec": {}}, "spec.podSelector: nothing -> {}"),
        (
            {"volumes": [{"name": "tmp", "emptyDir": {}}]},
            {"volumes": [{"name": "tmp", "hostPath": {"path": "/"}}]},
            "volumes[tmp].emptyDir: nothing -> {}",
        ),
        ({"spec": {"limits": {"memory": "1024Mi"}}}, {"spec": {"limits": {"memory": "1Gi"}}}, None),
        ({"spec": {"limits": {"x": 1}}}, {"spec": {"limits": {"x": "1"}}}, None),
        (
            {"spec": {"ports": [{"name": "http", "port": 1}]}},
            {"spec": {"ports": [{"name": "http", "port": 1, "x": 2}]}},
            None,
        ),
        ({"spec": {"image": "a:2"}}, {"spec": {"image": "a:1"}}, "spec.image: 'a:1' -> 'a:2'"),
        ({"spec": {"replicas": 2}}, {"spec": {"replicas": 1}}, "spec.replicas: 1 -> 2"),
        ({"spec": {"replicas": 0}}, {"spec": {"replicas": 1}}, "spec.replicas: 1 -> 0"),
        ({"spec": {"a": True}}, {"spec": {"a": 1}}, "spec.a: 1 -> True"),
        ({"spec": {"a": [1]}}, {"spec": {"a": [1, 2]}}, "spec.a: [1, 2] -> [1]"),
        ({"spec": {"env": [{"name": "A"}]}}, {"spec": {"env": []}}, "spec.env[A]: missing"),
        ({"metadata": {"labels": {"a": "b"}}}, {"metadata": {}}, "metadata.labels: nothing -> {'a': 'b'}"),
        ({"spec": {"a": "x" * 100}}, {"spec": {"a": "y"}}, f"spec.a: 'y' -> '{'x' * 76}..."),
        ({"metadata": {"a": 1}, "spec": {"b": 1}}, {"metadata": {}, "spec": {}}, "spec.b: nothing -> 1"),
    ],
)
def test_first_difference(wanted: dict[str, Any], found: dict[str, Any], words: str | None) -> None:
    assert first_difference(wanted, found) == words


def test_the_cause_is_named_before_what_follows() -> None:
    live, wanted = deployment.build(context()), deployment.build(context(image="a:2"))
    words = first_difference(wanted, live)
    assert words == "spec.template.spec.containers[worker].image: 'ghcr.io/acme/sdxl:1.0' -> 'a:2'"


@pytest.mark.parametrize("sample", sorted(SAMPLES))
def test_a_manifest_does_not_differ_from_itself(sample: str) -> None:
    built = deployment.build(SAMPLES[sample])
    assert first_difference(built, json.loads(json.dumps(built))) is None


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each map or list with each of its keys whose value is neither."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(each, dict | list):
            yield from _leaves(each)
        else:
            yield value, key


@pytest.mark.parametrize("sample", sorted(SAMPLES))
def test_what_was_alike_once_is_compared_again_when_any_of_it_changes(sample: str) -> None:
    built = deployment.build(SAMPLES[sample])
    live = json.loads(json.dumps({**built, "status": {"replicas": 1}}))
    assert first_difference(built, live) is None
    for part in ("metadata", "spec"):
        for place, key in _leaves(live[part]):
            before = place[key]
            place[key] = "another"
            assert first_difference(built, live), (key, before)
            place[key] = before
            assert first_difference(built, live) is None
    wanted = {**built, "spec": {**built["spec"], "replicas": 7}}
    assert first_difference(wanted, live) == f"spec.replicas: {built['spec']['replicas']} -> 7"
    live["metadata"]["resourceVersion"], live["status"] = "7", {}
    assert first_difference(built, live) is None
