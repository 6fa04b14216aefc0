"""Reading ``app.yaml``: what it means, and what is said about one that is wrong."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from drumline.api.manifests import TABLE, load_manifest, local_notes, plain_env, to_settings
from drumline.api.v1alpha1 import DistributedApp, MachineType
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError

MINIMAL: dict[str, Any] = {
    "apiVersion": "drumline.dev/v1alpha1",
    "kind": "DistributedApp",
    "metadata": {"name": "sdxl"},
    "spec": {"image": "ghcr.io/acme/sdxl:1.0", "workerClass": "app:SDXLWorker", "numGPUs": 2},
}


def manifest(**spec: Any) -> dict[str, Any]:
    return {**MINIMAL, "spec": {**MINIMAL["spec"], **spec}}


def write(folder: Path, *documents: Any) -> Path:
    path = folder / "app.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return path


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/app.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.parent.name)
def test_the_manifests_of_the_examples_name_their_class_and_folder(file):
    app = load_manifest(file)
    assert app.metadata.name == file.parent.name.replace("_", "-")
    module, _, name = app.spec.worker_class.partition(":")
    tree = ast.parse((file.parent / f"{module}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_minimal_app(tmp_path):
    settings = to_settings(load_manifest(write(tmp_path, MINIMAL)), folder=tmp_path)
    assert settings == RunnerSettings(
        target=f"{tmp_path}/app:SDXLWorker", name="sdxl", namespace="default", num_gpus=2, world_size=2
    )


def test_every_field_that_a_process_honours(tmp_path):
    document = manifest(
        setupArgs={"model": "tiny", "when": "2024-01-01"},
        warmupPayload={"prompt": "x"},
        numGPUs=0,
        worldSize=3,
        communication={"backend": "Gloo"},
        env=[
            {"name": "HF_HOME", "value": "/data"},
            {"name": "EMPTY"},
            {"name": "DRUMLINE_LOG_LEVEL", "value": "debug"},
        ],
        serving={
            "port": 9000,
            "requestTimeoutSeconds": 11,
            "startupTimeoutSeconds": 12,
            "maxQueueDepth": 13,
            "streamKeepaliveSeconds": 14,
        },
        rollout={"drainTimeoutSeconds": 15},
        failurePolicy={"maxGroupRestarts": 16, "windowSeconds": 17, "hangTimeoutSeconds": 18},
    )
    document["metadata"] = {"name": "sdxl", "namespace": "ml", "labels": {"a": "b"}}
    app = load_manifest(write(tmp_path, document))
    assert to_settings(app) == RunnerSettings(
        target="app:SDXLWorker",
        name="sdxl",
        namespace="ml",
        setup_args={"model": "tiny", "when": "2024-01-01"},
        warmup_payload={"prompt": "x"},
        num_gpus=0,
        world_size=3,
        device="cpu",
        backend="gloo",
        port=9000,
        request_timeout=11,
        startup_timeout=12,
        max_queue_depth=13,
        stream_keepalive=14,
        drain_timeout=15,
        hang_timeout=18,
        restart={"max_restarts": 16, "window_seconds": 17},
        log_level="debug",
    )
    assert plain_env(app) == {"HF_HOME": "/data", "EMPTY": "", "DRUMLINE_LOG_LEVEL": "debug"}
    assert local_notes(app) == ()


def test_the_table_names_real_fields_on_both_sides():
    assert set(TABLE) <= set(RunnerSettings.model_fields)
    schema = DistributedApp.model_json_schema(by_alias=True)
    for places, _ in TABLE.values():
        for place in places.split(", "):
            node: Any = schema
            for part in place.split("."):
                while "$ref" in node:
                    node = schema["$defs"][node["$ref"].rpartition("/")[2]]
                node = node["properties"][part]


def test_no_restart_and_no_hang_check(tmp_path):
    app = load_manifest(write(tmp_path, manifest(failurePolicy={"type": "RecreatePod", "hangTimeoutSeconds": 0})))
    settings = to_settings(app)
    assert settings.restart.max_restarts == 0
    assert settings.hang_timeout >= 3e7


def test_dates_are_strings(tmp_path):
    path = write(tmp_path, MINIMAL)
    path.write_text(path.read_text() + "  setupArgs: {when: 2024-01-01, at: 2024-01-01T10:00:00Z}\n")
    assert load_manifest(path).spec.setup_args == {"when": "2024-01-01", "at": "2024-01-01T10:00:00Z"}


def test_other_documents_are_skipped(tmp_path):
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}}
    assert load_manifest(write(tmp_path, service, None, MINIMAL)).metadata.name == "sdxl"


def test_a_manifest_as_the_cluster_returns_it(tmp_path):
    document = {**MINIMAL, "status": {"url": "http://x"}}
    document["metadata"] = {"name": "sdxl", "uid": "1", "generation": 3, "managedFields": []}
    assert load_manifest(write(tmp_path, document)).spec.num_gpus == 2


def test_notes_about_what_only_a_cluster_has(tmp_path):
    app = load_manifest(
        write(
            tmp_path,
            manifest(
                image=None,
                env=[{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                envFrom=[{"configMapRef": {"name": "c"}}],
                serving={"auth": {"type": "APIKey", "secretRef": {"name": "keys"}}},
            ),
        )
    )
    notes = "\n".join(local_notes(app))
    for word in ("TOKEN", "envFrom", "DRUMLINE_API_KEYS", "spec.image"):
        assert word in notes
    assert plain_env(app) == {}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"numGpus": 2}, "spec.numGpus: no such field; did you mean 'numGPUs'"),
        ({"serving": {"maxQueueDept": 2}}, "spec.serving.maxQueueDept: no such field; did you mean 'maxQueueDepth'"),
        ({"serving": {"auth": {"kind": "x"}}}, "spec.serving.auth.kind: no such field"),
        ({"env": [{"name": "A", "valeu": "x"}]}, "spec.env[0].valeu: no such field; did you mean 'value'"),
        ({"numGPUs": "2"}, "spec.numGPUs: Input should be a valid integer"),
        ({"numGPUs": -1}, "spec.numGPUs: Input should be greater than or equal to 0"),
        ({"workerClass": "app.py"}, "spec.workerClass: write module:Class"),
        ({"numGPUs": 2, "worldSize": 3}, "spec: worldSize is for CPU apps"),
        ({"numGPUs": 0, "communication": {"backend": "NCCL"}}, "spec: communication.backend NCCL needs numGPUs > 0"),
        ({"source": {}}, "spec.source: set exactly one of"),
        ({"gpu": {"allocation": "ResourceClaim"}}, "spec.gpu: resourceClaimTemplateName is required"),
        ({"rollout": {"type": "Recreate", "maxSurge": 1}}, "spec.rollout: maxSurge and maxUnavailable do not apply"),
        ({"sharedMemorySize": "lots"}, "spec.sharedMemorySize"),
        ({"env": [{"name": "DRUMLINE_PORT", "value": "high"}]}, "DRUMLINE_PORT: 'high' is not JSON"),
        ({"env": [{"name": "DRUMLINE_PROT", "value": "1"}]}, "DRUMLINE_PROT: no such setting"),
    ],
)
def test_wrong_fields_are_named(tmp_path, spec, words):
    with pytest.raises(ConfigurationError) as caught:
        to_settings(load_manifest(write(tmp_path, manifest(**spec))))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("", "no document (it has none at all) of kind DistributedApp"),
        ("kind: Service\n---\njust words\n", "no document (it has Service, str) of kind DistributedApp"),
        (yaml.safe_dump_all([MINIMAL, MINIMAL]), "2 documents of kind DistributedApp"),
        (yaml.safe_dump({**MINIMAL, "apiVersion": "drumline.dev/v1"}), "not known to this drumline"),
        (yaml.safe_dump({**MINIMAL, "apiVersion": "apps/v1"}), "'apps/v1' is not ours"),
        (yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "spec"}), "app.yaml: spec: required"),
        (yaml.safe_dump({**MINIMAL, "metadata": {"name": "SDXL"}}), "metadata.name: a name begins with a letter"),
        ("a: 1\na: 2\n", "'a' twice"),
    ],
)
def test_wrong_files(tmp_path, text, words):
    path = tmp_path / "app.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_manifest(path)
    assert words in str(caught.value)
    assert "app.yaml" in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        load_manifest(tmp_path / "app.yaml")
    (tmp_path / "app.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load_manifest(tmp_path / "app.yaml")


def test_every_field_explains_itself():
    for model in (DistributedApp, MachineType):
        schema = model.model_json_schema(by_alias=True)
        for name, definition in schema["$defs"].items():
            for field, shape in definition["properties"].items():
                assert shape.get("description"), f"{name}.{field}"
                assert "_" not in field


def test_machine_type():
    machine = MachineType.model_validate(
        {
            "apiVersion": "drumline.dev/v1alpha1",
            "kind": "MachineType",
            "metadata": {"name": "h100"},
            "spec": {"gpusPerNode": 8, "sharedMemorySizePerGPU": "8Gi", "aliases": ["GPU-H100"]},
        }
    )
    assert machine.spec.gpus_per_node == 8
    assert machine.spec.shared_memory_size_per_gpu == "8Gi"


def test_the_python_spelling_is_refused_in_yaml(tmp_path):
    with pytest.raises(ConfigurationError, match=r"spec\.num_gpus: no such field.*numGPUs"):
        load_manifest(write(tmp_path, manifest(num_gpus=2)))
