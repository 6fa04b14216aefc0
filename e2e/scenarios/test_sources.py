"""Code that is not in the image: from a ConfigMap, and from a git repository."""

from __future__ import annotations

import shlex

import pytest
from e2e.harness import apps
from e2e.harness.apps import App
from e2e.harness.client import Client, pod
from e2e.harness.kube import Kube, has

SERVED = "/tmp/served/code"
#: What a release of the code says when it is called.
SAYS = """
import os
from drumline.distributed import DistributedWorker

class Says(DistributedWorker):
    def __call__(self, streaming: bool = False) -> dict:
        return {{"word": "{word}", "folder": os.path.basename(os.getcwd())}}
"""


class Repository:
    """A git server in a pod, and the repository that it serves."""

    def __init__(self, kube: Kube, image: str) -> None:
        self.kube = kube
        daemon = "git daemon --reuseaddr --export-all --informative-errors --base-path=/tmp/served --port=9418"
        begin = f"git init --quiet --initial-branch=main {SERVED} && exec {daemon}"
        item = pod("git", image, ["sh", "-c", begin])
        item["spec"]["containers"][0]["readinessProbe"] = {
            "tcpSocket": {"port": 9418},
            "periodSeconds": 1,
            "timeoutSeconds": 30,
        }
        ports = {"selector": {"client": "git"}, "ports": [{"port": 9418}]}
        kube.apply(item, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "git"}, "spec": ports})
        kube.until("pod", "git", has("Ready", "True"), "the git server is ready")
        self.url = f"git://git.{kube.namespace}.svc/code"

    def commit(self, file: str, text: str) -> str:
        """Commit a file on the branch main; the commit's id."""
        who = "-c user.name=e2e -c user.email=e2e@example.org"
        folder = shlex.quote(f"{SERVED}/{file}".rpartition("/")[0])
        line = f"mkdir -p {folder} && cat > {SERVED}/{file} && cd {SERVED} && git add --all"
        line += f" && git {who} commit --quiet --message=x && git rev-parse HEAD"
        return self.kube("exec", "--stdin", "git", "--", "sh", "-c", line, input=text).strip()


@pytest.fixture
def repository(kube: Kube, worker_image: str) -> Repository:
    return Repository(kube, worker_image)


def test_code_from_a_config_map(kube: Kube, client: Client) -> None:
    """The app may come first, and changed code is a new revision."""
    app = App(kube, apps.app("said", workerClass="says:Says", source={"configMap": {"name": "said"}}))
    assert "there is no ConfigMap said" in app.says("SourceReady", "False", "ConfigMapNotFound")
    kube.apply(apps.config_map("said", {"says.py": SAYS.format(word="one")}))
    first = app.ready()["status"]["currentRevision"]
    assert client.call(app.url, {}).body["word"] == "one"
    kube.apply(apps.config_map("said", {"says.py": SAYS.format(word="two")}))
    kube.until("dapp", "said", lambda item: item["status"]["updateRevision"] != first, "the new code is a new revision")
    app.ready()
    client.call_until(app.url, {}, "word", "two")


def test_code_from_git(kube: Kube, client: Client, repository: Repository) -> None:
    first = repository.commit("apps/says.py", SAYS.format(word="one"))
    second = repository.commit("apps/says.py", SAYS.format(word="two"))
    git = {"url": repository.url, "revision": "main", "path": "apps"}
    app = App(kube, apps.app("fetched", workerClass="says:Says", source={"git": git}))
    app.ready()
    assert client.call(app.url, {}).body == {"word": "two", "folder": "apps"}
    for revision in (first, second[:10]):
        app.change(source={"git": {"revision": revision}})
        app.replaced()
        assert client.call(app.url, {}).body["word"] == ("one" if revision == first else "two")


def test_git_says_what_is_wrong(kube: Kube, repository: Repository) -> None:
    repository.commit("says.py", SAYS.format(word="one"))
    git = {"url": repository.url, "revision": "nowhere"}
    app = App(kube, apps.app("wrong", workerClass="says:Says", source={"git": git}))
    # The server's Service may refuse at first, which is another reason why nothing could be fetched.
    app.says("SourceReady", "False", "GitFetchFailed", "nowhere")
    app.change(source={"git": {"revision": "main"}})
    app.ready()
