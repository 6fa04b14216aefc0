"""The worker image: it does all that the operator asks in a restricted pod, and a change of code is a small change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import runtime
from e2e.cluster.builder import Builder
from e2e.cluster.errors import ClusterError
from e2e.cluster.images import Folder, images, layer_digests
from e2e.cluster.layout import CHECKOUT
from e2e.cluster.local import LocalCluster
from e2e.cluster.project import ProjectImage
from e2e.cluster.provider import Cluster
from e2e.conftest import restricted_namespace
from e2e.probe import Kubectl

from drumline.api.v1alpha1 import DistributedApp
from drumline_operator.manifests import deployment
from drumline_operator.manifests.context import Context
from drumline_operator.settings import OperatorSettings

#: For a pod on a busy machine to load torch.
LIMIT = "180s"
ENV = [{"name": "DRUMLINE_DEVICE", "value": "cpu"}, {"name": "OMP_NUM_THREADS", "value": "1"}]


#: With what takes longest left out: headers compiled beforehand, and tests for each kind of vector unit.
COMPILED = """
import torch
import torch._inductor.config as config

config.cpp_cache_precompile_headers = False
config.cpp.vec_isa_ok = False
config.compile_threads = 1
print(float(torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(3)).sum()))
"""


class Replica:
    """The one pod of an app, made as the operator makes it; here without the operator."""

    def __init__(self, kubectl: Kubectl, namespace: str, image: str, name: str = "app", **spec: Any) -> None:
        fields = {"image": image, "numGPUs": 2, "env": ENV, "resources": {"requests": {"cpu": "20m"}}} | spec
        document = {
            "apiVersion": "drumline.dev/v1alpha1",
            "kind": "DistributedApp",
            "metadata": {"name": name, "namespace": namespace},
            "spec": fields,
        }
        app = DistributedApp.model_validate(document, by_name=False)
        item = deployment.build(Context(app, "none", OperatorSettings()))
        del item["metadata"]["ownerReferences"]
        self._kubectl, self._namespace = kubectl, namespace
        self("create", "--filename=-", input=json.dumps(item))
        self("wait", "--for=jsonpath={.status.readyReplicas}=1", f"deployment/{name}", f"--timeout={LIMIT}")
        (pod,) = json.loads(self("get", "pods", f"--selector=drumline.dev/app={name}", "--output=json"))["items"]
        self.name, self.address = pod["metadata"]["name"], pod["status"]["podIP"]

    def __call__(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl in the namespace."""
        return self._kubectl(f"--namespace={self._namespace}", *arguments, input=input)

    def execute(self, *command: str) -> str:
        """Run a command in the worker container."""
        return self("exec", self.name, "--container=worker", "--", *command)

    def curl(self, path: str, payload: dict[str, Any]) -> str:
        """Call it from inside the pod, as a person would who looks for a mistake."""
        body = ["--data", json.dumps(payload)]
        return self.execute("curl", "-sSN", "--fail-with-body", "--max-time", "120", *body, f"localhost:8080{path}")


def events(stream: str) -> list[str]:
    return re.findall(r"^event: (.*)$", stream, re.MULTILINE)


@pytest.fixture(scope="module")
def replica(kubectl: Kubectl, worker_image: str) -> Iterator[Replica]:
    """One for all tests that only look."""
    with restricted_namespace(kubectl) as namespace:
        yield Replica(kubectl, namespace, worker_image, workerClass="drumline.testing.workers:Facts")


def test_two_ranks_serve_in_a_restricted_pod(replica: Replica) -> None:
    ranks = json.loads(replica.curl("/", {}))["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert {rank["backend"] for rank in ranks} == {"gloo"}
    assert {rank["cwd"] for rank in ranks} == {"/app"}
    assert events(replica.curl("/stream", {})) == ["result"]

    # As little as possible: no root, nothing writable but what is mounted, no capability.
    status = dict(
        line.split(":\t") for line in replica.execute("cat", "/proc/1/status").splitlines() if line.count(":\t") == 1
    )
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    root = next(line.split() for line in replica.execute("cat", "/proc/mounts").splitlines() if line.split()[1] == "/")
    assert "ro" in root[3].split(",")
    home, cache = replica.execute(
        "sh", "-c", "touch $HOME/x && mkdir -p $XDG_CACHE_HOME/y && echo $HOME $XDG_CACHE_HOME"
    ).split()
    assert (home, cache) == ("/tmp", "/data/.cache")


def test_what_the_image_says_of_itself(replica: Replica) -> None:
    doctor = json.loads(replica.execute("drumline", "doctor", "--output=json"))
    assert [finding for finding in doctor["findings"] if finding["status"] == "problem"] == []
    # torch with CUDA, the versions that are locked, all of them and no contradiction between them.
    found = replica.execute("python", "-c", "import torch; print(torch.version.cuda, torch.__version__)").split()
    assert found[0] != "None"
    assert f"torch=={found[1].partition('+')[0]}" in (CHECKOUT / "images/torch.lock").read_text()
    replica.execute("uv", "pip", "check", "--offline", "--no-cache", "--python=/opt/drumline/bin/python")
    # All that the git source needs, and a compiled drumline: with a read-only root it would be compiled at every start.
    replica.execute("sh", "-c", "git --version && command -v ssh curl g++ tini")
    script = "import drumline.server.app as m, importlib.util as u, os; print(os.path.exists(u.cache_from_source(m.__file__)))"
    assert replica.execute("python", "-c", script).strip() == "True"


def test_torch_compile_finds_its_compiler(replica: Replica) -> None:
    assert replica.execute("python", "-c", COMPILED).split()[-1] == "3.0"
    assert replica.execute("sh", "-c", "ls $TORCHINDUCTOR_CACHE_DIR").split()


def test_a_request_is_finished_before_the_pod_ends(
    cluster: Cluster, kubectl: Kubectl, namespace: str, worker_image: str
) -> None:
    replica = Replica(kubectl, namespace, worker_image, workerClass="drumline.testing.workers:Steps")
    # From another pod: what runs in the pod itself would be killed with it.
    caller = Replica(
        kubectl, namespace, worker_image, name="caller", workerClass="drumline.testing.workers:Echo", numGPUs=1
    )
    payload = json.dumps({"steps": 40, "seconds": 0.1})
    command = [
        "exec",
        caller.name,
        "--",
        "curl",
        "-sSN",
        "--max-time",
        "180",
        "--data",
        payload,
        f"{replica.address}:8080/stream",
    ]
    with subprocess.Popen(
        ["kubectl", f"--namespace={namespace}", *command],
        env=cluster.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as call:
        assert call.stdout
        first = call.stdout.readline()
        replica("delete", "pod", replica.name, "--wait=false")
        rest = call.stdout.read()
    said = events(first + rest)
    assert said == ["update"] * 40 + ["result"]
    replica("wait", "--for=delete", f"pod/{replica.name}", "--timeout=180s")


#: Leaves a process behind whose parent ends first, and says whether it is still there, dead or alive, after a while.
ORPHAN = """
import os, time

reader, writer = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(writer, str(os.getpid()).encode())
    os._exit(0)
os.wait()
orphan = f"/proc/{os.read(reader, 10).decode()}"
deadline = time.monotonic() + 60
while os.path.exists(orphan) and time.monotonic() < deadline:  # nothing tells when a process is reaped by another one
    time.sleep(0.01)
print(os.path.exists(orphan))
"""


def test_nothing_dead_is_left_lying(replica: Replica) -> None:
    assert replica.execute("python", "-c", ORPHAN).strip() == "False"
    assert replica.execute("cat", "/proc/1/comm").strip() == "tini"


APP = """\
from drumline.distributed import DistributedWorker


class Hello(DistributedWorker):
    def __call__(self, streaming: bool = False) -> str:
        return "hello from my own image"
"""


def test_an_image_of_ones_own_adds_its_code_and_nothing_else(
    cluster: Cluster, kubectl: Kubectl, namespace: str, worker_image: str, tmp_path: Path
) -> None:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("other clusters get their images from Docker")
    builder = Builder(report=lambda _: None)
    name = f"localhost/drumline/own:{namespace}"
    # As the documentation has it. All that is asked for is there, so this takes nothing from the network.
    (example,) = re.findall(r"^```dockerfile\n(.*?)^```", (CHECKOUT / "docs/guide/images.md").read_text(), re.M | re.S)
    (tmp_path / "Dockerfile").write_text(example.replace("FROM drumline-worker", f"FROM {worker_image}"))
    (tmp_path / "requirements.txt").write_text("torch>=2\ndiffusers\n")
    (tmp_path / "app.py").write_text(APP)
    try:
        layout = builder.build(name, tmp_path / "Dockerfile", tmp_path)
        below = layers(builder.layout(worker_image))
        assert layers(layout)[: len(below)] == below
        copied = runtime.load(cluster.nodes, layout, unpacked=builder.unpacked())
        assert max(copied.values()) < 1_000_000
        replica = Replica(kubectl, namespace, name, workerClass="app:Hello", numGPUs=1)
        assert json.loads(replica.curl("/", {})) == "hello from my own image"
    finally:
        builder.remove(name)


def test_a_change_of_code_changes_one_layer(cluster: Cluster, worker_image: str, tmp_path: Path) -> None:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("other clusters get their images from Docker")
    builder = Builder(report=lambda _: None)
    image = ProjectImage("worker", tmp_path)
    for path in (image.dockerfile.name, ".dockerignore", "LICENSE", "pyproject.toml"):
        shutil.copyfile(CHECKOUT / path, tmp_path / path)
    for path in ("images", "worker"):
        shutil.copytree(CHECKOUT / path, tmp_path / path, copy_function=shutil.copyfile)  # with modes and times of now
    with (tmp_path / "worker/drumline/errors.py").open("a") as module:
        module.write(f"# {tmp_path}\n")
    assert image.reference != worker_image
    try:
        before, after = layers(builder.layout(worker_image)), layers(layout := image.layout(builder))
        assert [old == new for old, new in zip(before, after, strict=True)] == [True] * (len(before) - 1) + [False]
        copied = runtime.load(cluster.nodes, layout, unpacked=builder.unpacked())
        assert max(copied.values()) < 10_000_000
    finally:
        builder.remove(image.reference)


def layers(layout: Path) -> list[str]:
    (image,) = images(Folder(layout))
    return layer_digests(Folder(layout), image)


def test_torch_for_cpus_needs_an_index_that_has_it(cluster: Cluster, worker_image: str) -> None:
    if not isinstance(cluster, LocalCluster):
        pytest.skip("other clusters get their images from Docker")
    builder, image = Builder(report=lambda _: None), ProjectImage("worker")
    for argument, words in {"TORCH=cpu": "TORCH_INDEX_URL", "TORCH=rocm": "must be cuda or cpu"}.items():
        with pytest.raises(ClusterError, match=words):
            builder.build("localhost/drumline/never:1", image.dockerfile, CHECKOUT, [argument])
