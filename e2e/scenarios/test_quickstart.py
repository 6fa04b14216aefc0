"""What the README and the guide promise of a cluster, from another pod."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import yaml
from e2e.cluster.layout import CHECKOUT
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client
from e2e.harness.kube import LIMIT, Kube
from PIL import Image

SDXL = CHECKOUT / "examples" / "parallel_sdxl"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page of documentation."""
    parts = page.read_text(encoding="utf-8").split(f"```{language}\n")[1:]
    return [part.partition("```")[0] for part in parts]


def test_the_readme(kube: Kube, client: Client) -> None:
    """The worker and the manifest of the README, applied, waited for, invoked and streamed."""
    page = CHECKOUT / "README.md"
    (source,) = (each for each in blocks(page, "python") if "class Beat" in each)
    manifest = next(yaml.safe_load(each) for each in blocks(page, "yaml") if "kind: DistributedApp" in each)
    name = manifest["metadata"]["name"]
    # Its image is somebody's own; here the code comes from a ConfigMap, and the image is the operator's.
    del manifest["spec"]["image"]
    manifest["spec"]["source"] = {"configMap": {"name": "beat"}}
    kube.apply(apps.config_map("beat", {"beat.py": source}))
    App(kube, manifest)
    kube("wait", "--for=condition=Ready", f"dapp/{name}", f"--timeout={LIMIT:.0f}s")

    url = f"http://{name}.{kube.namespace}.svc:8080"
    assert (
        kube("get", "dapp", name, "--output=jsonpath={.status.url}")
        == f"http://{name}.{kube.namespace}.svc.cluster.local:8080"
    )
    assert client.call(url, {"beats": 4}).body == {"total": 12.0}
    stream = client.stream(f"{url}/stream", {"beats": 4})
    assert stream.result() == {"total": 12.0}
    done = [each.data["progress"]["done"] for each in stream.events if "progress" in each.data]
    assert done == [1, 2, 3, 4]
    refused = client.call(url, {"beats": "many"})
    assert (refused.status, refused.body["type"].rpartition("/")[2]) == (422, "validation-error")
    assert json.loads(client.run("drumline", "invoke", f"{name}.{kube.namespace}.svc:8080", "beats=2")) == {
        "total": 6.0
    }


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
