"""What the guide promises of a cluster, and the example that everybody tries first."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from e2e.cluster.layout import CHECKOUT
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import Kube
from PIL import Image

GUIDE = CHECKOUT / "docs" / "guide" / "kubernetes.md"
SDXL = CHECKOUT / "examples" / "parallel_sdxl"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page of documentation."""
    parts = page.read_text(encoding="utf-8").split(f"```{language}\n")[1:]
    return [part.partition("```")[0] for part in parts]


class Guide:
    """The commands of the guide, run as they stand there, in a folder with its files."""

    def __init__(self, kube: Kube, folder: Path) -> None:
        self.kube, self.folder = kube, folder
        for language in ("python", "yaml"):
            for block in blocks(GUIDE, language):
                name, _, rest = block.partition("\n")
                if name.startswith("# "):
                    (folder / name.removeprefix("# ")).write_text(rest, encoding="utf-8")
        # A kubeconfig of its own, so that the test's namespace is the current one.
        config = folder / "kubeconfig"
        config.write_text(kube("config", "view", "--raw", "--flatten"), encoding="utf-8")
        self._env = kube.cluster.environment() | {"KUBECONFIG": str(config)}
        self._env["PATH"] = f"{Path(sys.executable).parent}:{self._env['PATH']}"
        self.run(f"kubectl config set-context --current --namespace={kube.namespace}")

    def run(self, line: str) -> str:
        """Run a shell command; what it prints."""
        done = subprocess.run(
            line, shell=True, cwd=self.folder, env=self._env, text=True, capture_output=True, check=False, timeout=540
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def line(self, begins: str) -> str:
        """The command of the guide that begins like this, with the test's namespace in place of `default`."""
        lines = [line for block in blocks(GUIDE, "sh") for line in block.splitlines() if line.startswith(begins)]
        return lines[0].replace(".default.svc", f".{self.kube.namespace}.svc")


def test_the_guide(kube: Kube, client: Client, worker_image: str, tmp_path: Path) -> None:
    """Applied, waited for, and called: by its name from outside, by its Service from another pod."""
    guide = Guide(kube, tmp_path)
    for begins in ("kubectl create configmap", "kubectl apply", "kubectl wait"):
        guide.run(guide.line(begins))
    row = guide.run("kubectl get dapp").splitlines()[1].split()
    url = f"http://beat.{kube.namespace}.svc.cluster.local:8080"
    assert [*row[:4], row[-2]] == ["beat", "True", "Serving", "1/1", url]

    assert json.loads(guide.run(guide.line("drumline invoke beat"))) == {"total": 12.0}
    assert "12.0" in guide.run(guide.line("drumline stream beat"))
    client.reach(url)
    assert json.loads(client.run("sh", "-c", f"{guide.line('curl http')} --silent")) == {"total": 12.0}
    curl, _, body = guide.line("curl -N http").partition(" -d ")
    stream = client.stream(curl.split()[-1], json.loads(shlex.split(body)[0]))
    assert stream.result() == {"total": 12.0}
    assert [each.data["progress"]["done"] for each in stream.events[:-1]] == [1, 2, 3, 4]
    refused = client.call(url, {"beats": "many"})
    assert (refused.status, refused.body["type"].rpartition("/")[2]) == (422, "validation-error")
    # From a pod by its name, too: it may not look apps up, so the usual address is tried, and said.
    cli = Client(kube, worker_image, "cli", automountServiceAccountToken=True)
    cli.reach(url)  # it may be on another node
    assert json.loads(cli.run("drumline", "invoke", "beat", "beats=2")) == {"total": 6.0}

    guide.run(guide.line("kubectl scale"))
    kube.until("dapp", "beat", lambda item: item.get("status", {}).get("replicas") == 3, "is scaled")
    guide.run(guide.line("kubectl delete dapp"))
    kube("wait", "--for=delete", "deployment/beat", "--timeout=180s")


def test_sdxl_on_two_ranks(kube: Kube, client: Client) -> None:
    """The example with its tiny model: two ranks that ask for GPUs, here without CUDA."""
    manifest = yaml.safe_load((SDXL / "app.yaml").read_text(encoding="utf-8"))
    manifest["spec"] |= {
        "source": {"configMap": {"name": "sdxl"}},
        "setupArgs": {"model": "tiny"},
        "env": [{"name": "DRUMLINE_DEVICE", "value": "cpu"}, {"name": "OMP_NUM_THREADS", "value": "1"}],
    }
    del manifest["spec"]["image"], manifest["spec"]["machineType"]
    kube.apply(apps.config_map("sdxl", {"app.py": (SDXL / "app.py").read_text(encoding="utf-8")}))
    app = App(kube, manifest)
    live = app.ready(limit=240)
    assert live["status"]["groups"][0]["readyRanks"] == 2
    size = {"width": 128, "height": 128, "num_inference_steps": 6, "seed": 7}
    stream = client.stream(f"{app.url}/stream", {"prompt": "a lighthouse", **size})
    final = picture(stream.result()["image"]["url"])
    assert final.size == (256, 128)
    assert final.crop((0, 0, 128, 128)).tobytes() != final.crop((128, 0, 256, 128)).tobytes(), "each rank draws its own"
    previews = [each.data for each in stream.events[:-1] if "image" in each.data]
    assert len(previews) == 2
    progress = [each.data["progress"]["done"] for each in stream.events[:-1] if "progress" in each.data]
    assert progress == [1, 2, 3, 4, 5, 6]
    again = client.call(app.url, {"prompt": "a lighthouse", **size}).body
    assert picture(again["image"]["url"]).tobytes() == final.tobytes(), "the same seed draws the same picture"


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).convert("RGB")
