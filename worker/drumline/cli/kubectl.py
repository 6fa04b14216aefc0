"""Calls of ``kubectl``, which knows contexts, certificates and login plugins; what it complains of becomes our errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from drumline.cli.cluster_app import RESOURCE, Found, Wanted, found, not_found
from drumline.cli.output import State
from drumline.errors import ConfigurationError, ConnectionFailed, DrumlineError, NotReady

#: For the API server to answer, and for a call with a login plugin to end.
_REQUEST_TIMEOUT = "--request-timeout=15s"
_CALL_SECONDS = 60.0
#: kubectl has several ways to say it.
_NO_CONTEXT = re.compile(
    r"(cannot locate|no such) context|context .*(does not exist|was not found)|context was not found"
)


@dataclass(frozen=True)
class Place:
    """Where kubectl's calls go."""

    context: str
    namespace: str

    def __str__(self) -> str:
        return f"the cluster of context {self.context}"


class Kubectl:
    """kubectl with the context that the user chose.

    Args:
        context: of the kubeconfig; None: the current one.

    Raises:
        ConfigurationError: there is no kubectl, or no kubeconfig.
    """

    def __init__(self, context: str | None = None) -> None:
        program = shutil.which("kubectl")
        if program is None:
            State.hint = "install kubectl (kubernetes.io/docs/tasks/tools), or pass the app's URL"
            raise ConfigurationError("apps of a cluster are reached through kubectl, and there is none on PATH")
        if not (files := kubeconfigs(os.environ)):
            State.hint = "set KUBECONFIG, or pass the app's URL"
            where = os.environ.get("KUBECONFIG") or "~/.kube/config"
            raise ConfigurationError(f"no kubeconfig: {where} does not exist")
        self._files = files
        self._command = [program, *([f"--context={context}"] if context else [])]

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of a call."""
        return [*self._command, *arguments]

    def place(self, namespace: str | None) -> Place:
        """Return the context in use, and ``namespace`` or the context's own.

        Raises:
            ConfigurationError: there is no such context, or none is current.
        """
        view = self.get_json("config", "view", "--minify")
        chosen = view["contexts"][0]
        return Place(chosen["name"], namespace or (chosen.get("context") or {}).get("namespace") or "default")

    def app(self, app: Wanted) -> tuple[Found, Place]:
        """Return the app, and where it is.

        Raises:
            ConfigurationError: there is none of that name, or the user may not see it.
            ConnectionFailed: the API server does not answer.
            NotReady: no replica of it can answer.
        """
        place = self.place(app.namespace)
        within = f"--namespace={place.namespace}"
        done = self._run("get", RESOURCE, app.name, within, "--output=json", _REQUEST_TIMEOUT)
        if done.returncode and "(NotFound)" in done.stderr:
            State.hint = f"kubectl --context={place.context} get {RESOURCE} --all-namespaces"
            raise not_found(app.name, place.namespace, str(place), self._apps(within))
        if done.returncode:
            self._complain(done.stderr, str(place))
        try:
            return found(json.loads(done.stdout)), place
        except NotReady:
            chosen = f"--context={place.context} {within}"
            State.hint = (
                f"kubectl {chosen} describe dapp {app.name}; "
                f"or wait: kubectl {chosen} wait --for=condition=Ready dapp/{app.name} --timeout=30m"
            )
            raise

    def _apps(self, within: str) -> list[tuple[str, str]]:
        """Namespace and name of all apps that the user may see."""
        shape = '{range .items[*]}{.metadata.namespace}{" "}{.metadata.name}{"\\n"}{end}'
        for scope in ("--all-namespaces", within):
            done = self._run("get", RESOURCE, scope, f"--output=jsonpath={shape}", _REQUEST_TIMEOUT)
            if done.returncode == 0:
                return [(namespace, name) for namespace, name in map(str.split, done.stdout.splitlines())]
        return []

    def get_json(self, *arguments: str) -> Any:
        """Run kubectl and return the JSON that it prints."""
        done = self._run(*arguments, "--output=json")
        if done.returncode:
            self._complain(done.stderr, "the cluster")
        return json.loads(done.stdout)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(  # noqa: S603
                self.command(*arguments),
                stdin=subprocess.DEVNULL,  # a login plugin that would ask something fails at once, and says so
                capture_output=True,
                text=True,
                timeout=_CALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConnectionFailed(f"kubectl {arguments[0]} did not end within {_CALL_SECONDS:.0f} s") from None

    def _complain(self, complaint: str, where: str) -> NoReturn:
        raise error_of(complaint, where, ", ".join(map(str, self._files)))


def error_of(complaint: str, where: str, files: str) -> DrumlineError:
    """Return what kubectl's error output means, and set the hint for it.

    Args:
        complaint: what it printed.
        where: which cluster, in words.
        files: the kubeconfig files.
    """
    said = complaint.strip().splitlines()[-1] if complaint.strip() else "it failed without a word"
    said = said.removeprefix("error: ").removeprefix("Error from server ")
    if "current-context must exist" in complaint or "localhost:8080" in complaint:
        State.hint = "kubectl config use-context NAME, or --context NAME; kubectl config get-contexts lists them"
        return ConfigurationError(f"{files} has no current context")
    if _NO_CONTEXT.search(said):
        State.hint = "kubectl config get-contexts, which lists them"
        return ConfigurationError(f"{files}: {said}")
    if "the server doesn't have a resource type" in complaint:
        State.hint = "install drumline there (docs/guide/installing.md), or choose another --context"
        return ConfigurationError(f"{where} has no drumline: it does not know DistributedApps")
    if "(Forbidden)" in complaint:
        State.hint = "ask for a role that allows it, or pass a URL that reaches the app"
        return ConfigurationError(f"{where} does not let you: {said.removeprefix('(Forbidden): ')}")
    if "Unauthorized" in complaint or "must be logged in" in complaint:
        State.hint = "log in as your cluster asks for it; `kubectl auth whoami` tells whether it worked"
        return ConfigurationError(f"{where} does not know you: {said}")
    State.hint = "kubectl cluster-info, which tells whether the cluster can be reached"
    return ConnectionFailed(f"{where}: kubectl says: {said}")


def kubeconfigs(environment: Mapping[str, str]) -> list[Path]:
    """Return the kubeconfig files that kubectl would read and that exist."""
    named = environment.get("KUBECONFIG")
    files = [Path(part) for part in (named or "").split(os.pathsep) if part] or [Path.home() / ".kube" / "config"]
    return [path for path in files if path.is_file()]
