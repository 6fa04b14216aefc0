"""What the chart's roles allow, on a real API server: all that the operator needs, nothing more, and what people may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster.errors import ClusterError
from e2e.cluster.waiting import wait_for

from drumline.api.v1alpha1 import DistributedApp
from drumline_operator.manifests import deployment, networkpolicy, pdb, service
from drumline_operator.manifests.context import Context
from drumline_operator.settings import OperatorSettings

from .api_server import ACCOUNT, APPS, Right, Server, asked, namespace, node, rights
from .conftest import NAME, NAMESPACE, Helm, Object, container, one, ordinary, pod

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def server(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the chart in it, and a node and a namespace for apps."""
    try:
        found = Server(tmp_path_factory.mktemp("access"))
        found.api.__enter__()
    except ClusterError as error:
        pytest.skip(str(error))
    try:
        found.apply(
            [
                namespace(NAMESPACE, "restricted"),
                namespace(APPS, "restricted"),
            ]
        )
        node(found, "early")
        found.install(ordinary(helm.render()))
        yield found
    finally:
        found.api.stop()


# -- what is installed


def test_the_server_takes_all_of_it(helm: Helm, server: Server) -> None:
    """Hooks, too; strictly, so that an unknown field is an error."""
    server.apply(helm.render(known=False), "--dry-run=server", "--force-conflicts")


def test_pods_are_let_into_a_restricted_namespace(helm: Helm, server: Server) -> None:
    items = helm.render()
    template = pod(items)
    metadata = {"name": "operator", "namespace": NAMESPACE, "labels": template["metadata"]["labels"]}
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}, one(items, "Pod")]
    server.apply(pods, "--dry-run=server")
    del template["spec"]["securityContext"]["seccompProfile"]
    with pytest.raises(ClusterError, match='violates PodSecurity "restricted:latest"'):
        server.apply(pods, "--dry-run=server")


# -- the operator


def environment(items: list[Object]) -> dict[str, str]:
    """The variables of the operator's container."""
    fields = {"metadata.namespace": NAMESPACE, "metadata.name": "operator-0"}
    return {
        each["name"]: each.get("value") or fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container(items)["env"]
        if each.get("value") != ""
    }


@contextmanager
def operator(server: Server, items: list[Object], log: Path) -> Iterator[None]:
    """The process, as the chart starts it, with the rights of its service account."""
    variables = environment(items) | {"KUBECONFIG": str(server.kubeconfig()), "DRUMLINE_OPERATOR_BIND": "127.0.0.1:0"}
    variables |= {"PATH": os.environ["PATH"], "DRUMLINE_OPERATOR_RETRY_PERIOD": "0.5"}
    variables |= {f"DRUMLINE_OPERATOR_{name}_INTERVAL": "1" for name in ("REPLACE", "PROGRESS")}
    with log.open("w") as out:
        line = [sys.executable, "-m", "drumline_operator"]
        process = subprocess.Popen(line, env=variables, stdout=out, stderr=out, cwd=log.parent)
        try:
            yield
        finally:
            process.terminate()
            try:
                assert process.wait(60) == 0, log.read_text()
            finally:
                process.kill()


def app(name: str, **spec: Any) -> Object:
    return {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": name, "namespace": APPS},
        "spec": {"workerClass": "app:Worker", "numGPUs": 0, "worldSize": 2, **spec},
    }


def machine(name: str) -> Object:
    spec = {"nodeSelector": {"gpu": "h100"}}
    return {"apiVersion": "drumline.dev/v1alpha1", "kind": "MachineType", "metadata": {"name": name}, "spec": spec}


def crashing(name: str, owner: str) -> tuple[Object, Object]:
    """A pod of an app, and a status that says its container ended again and again."""
    labels = {"drumline.dev/app": owner}
    limits = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    spec = {
        "containers": [{"name": "worker", "image": "x", "securityContext": limits}],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": 0,
    }
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": APPS, "labels": labels}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    container_status = {
        "name": "worker",
        "image": "x",
        "imageID": "",
        "ready": False,
        "restartCount": 3,
        "state": waiting,
    }
    return {**item, "spec": spec}, {"status": {"phase": "Running", "containerStatuses": [container_status]}}


def wait(server: Server, condition: str, *what: str) -> None:
    server.kubectl("wait", f"--for={condition}", f"--namespace={APPS}", "--timeout=90s", *what)


def exercise(server: Server) -> None:
    """Make the operator do all that it can do."""
    source = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "code", "namespace": APPS}}
    server.apply(
        [
            {**source, "data": {"app.py": "x = 1"}},
            machine("late"),
            app("source", source={"configMap": {"name": "code"}}, networkPolicy="DenyAllIngress"),
            app("gpu", image="x", numGPUs=8, worldSize=8, machineType="late"),
            app("broken", image="x", failurePolicy={"type": "RecreatePod"}),
        ]
    )
    wait(server, "create", "networkpolicy/source")
    wait(server, "create", "deployment/source", "service/gpu", "poddisruptionbudget/broken")
    wait(server, "jsonpath={.status.observedGeneration}=1", "dapp/source", "dapp/gpu", "dapp/broken")
    before = server.kubectl(
        "get", "deployment/source", f"--namespace={APPS}", "--output=jsonpath={.metadata.generation}"
    )
    server.apply([{**source, "data": {"app.py": "x = 2"}}])
    wait(server, f"jsonpath={{.metadata.generation}}={int(before) + 1}", "deployment/source")
    patch = '{"spec": {"networkPolicy": "Disabled"}}'
    server.kubectl("patch", "dapp/source", f"--namespace={APPS}", "--type=merge", f"--patch={patch}")
    wait(server, "delete", "networkpolicy/source")
    body, status = crashing("broken-0", "broken")
    server.apply([body])
    options = (f"--namespace={APPS}", "--subresource=status", "--type=merge", f"--patch={json.dumps(status)}")
    server.kubectl("patch", "pod/broken-0", *options)
    wait(server, "delete", "pod/broken-0")

    # A pod that does not begin.
    revision = server.kubectl("get", "dapp/source", f"--namespace={APPS}", "--output=jsonpath={.status.updateRevision}")
    body, _ = crashing("source-0", "source")
    body["metadata"]["labels"]["drumline.dev/revision"] = revision
    body["spec"]["nodeName"] = "early"
    server.apply([body])
    uid = uid_of(server, body)
    subject = {"kind": "Pod", "name": "source-0", "namespace": APPS, "uid": uid}
    meta = {"name": "source-0", "namespace": APPS}
    event = {"apiVersion": "v1", "kind": "Event", "metadata": meta, "involvedObject": subject, "type": "Warning"}
    server.apply([{**event, "reason": "FailedMount", "message": 'secret "git" not found'}])
    wait(server, 'jsonpath={.status.conditions[?(@.type=="Ready")].reason}=MountFailed', "dapp/source")
    # Children that can only be made anew; the app waits for its machine meanwhile.
    server.apply([app("again", image="x", machineType="absent")])
    wait(server, "jsonpath={.status.observedGeneration}=1", "dapp/again")
    uid = server.kubectl("get", "dapp/again", f"--namespace={APPS}", "--output=jsonpath={.metadata.uid}")
    theirs = wrong("again", uid)
    server.apply(theirs)
    before = [uid_of(server, each) for each in theirs]
    server.apply([machine("absent")])
    for each, old in zip(theirs, before, strict=True):
        wait_for(f"another {each['kind']}", lambda each=each, old=old: uid_of(server, each) not in {"", old}, limit=90)
    # Names that others have: the operator looks whose they are.
    for each in others():
        name = each["metadata"]["name"]
        server.apply([each, app(name, image="x", networkPolicy="DenyAllIngress")])
        wait(server, 'jsonpath={.status.conditions[?(@.type=="Ready")].reason}=NameTaken', f"dapp/{name}")


def others() -> list[Object]:
    """One object of each kind of child that is not the operator's, with an app's name."""
    select = {"matchLabels": {"else": "x"}}
    pods = {"metadata": {"labels": {"else": "x"}}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
    kinds: list[tuple[str, str, Object]] = [
        ("v1", "Service", {"selector": {"else": "x"}, "ports": [{"port": 80}]}),
        ("policy/v1", "PodDisruptionBudget", {"selector": select, "maxUnavailable": 1}),
        ("networking.k8s.io/v1", "NetworkPolicy", {"podSelector": select}),
        ("apps/v1", "Deployment", {"selector": select, "template": pods}),
    ]
    return [
        {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": f"taken-{number}", "namespace": APPS},
            "spec": spec,
        }
        for number, (version, kind, spec) in enumerate(kinds)
    ]


def wrong(name: str, owner: str) -> list[Object]:
    """An app's Deployment and Service with what no write can change."""
    reference = {"apiVersion": "drumline.dev/v1alpha1", "kind": "DistributedApp", "name": name, "uid": owner}
    labels = {"drumline.dev/app": name}
    meta = {"name": name, "namespace": APPS, "labels": labels, "ownerReferences": [{**reference, "controller": True}]}
    pods = {"metadata": {"labels": {"else": "x"}}, "spec": {"containers": [{"name": "worker", "image": "x"}]}}
    deployment = {"selector": {"matchLabels": {"else": "x"}}, "template": pods}
    service = {"clusterIP": "None", "ports": [{"name": "http", "port": 8080}]}
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": deployment},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
    ]


def uid_of(server: Server, item: Object) -> str:
    """Empty when there is none."""
    what = f"{item['kind']}/{item['metadata']['name']}"
    return server.kubectl("get", what, f"--namespace={APPS}", "--ignore-not-found", "--output=jsonpath={.metadata.uid}")


#: Rights that no request shows, because the API server asks for them by itself, and what it says without them.
UNSEEN: Mapping[Right, str] = {
    ("drumline.dev", "distributedapps/finalizers", "update"): "cannot set blockOwnerDeletion",
    ("apps", "deployments", "create"): "is forbidden",
    ("", "services", "create"): "is forbidden",
    ("policy", "poddisruptionbudgets", "create"): "is forbidden",
    ("networking.k8s.io", "networkpolicies", "create"): "is forbidden",
}


def used(requests: list[Object]) -> set[Right]:
    found = set()
    for each in requests:
        what = each.get("objectRef")
        if what and what.get("resource"):
            resource = "/".join(part for part in (what["resource"], what.get("subresource")) if part)
            found.add((what.get("apiGroup", ""), resource, each["verb"]))
    return found


def refusals(requests: list[Object]) -> list[str]:
    return [
        f"{each['verb']} {each['requestURI']}"
        for each in requests
        if each.get("responseStatus", {}).get("code") in {401, 403}
    ]


def test_the_operator_needs_all_that_it_may_do_and_no_more(helm: Helm, server: Server, tmp_path: Path) -> None:
    items = helm.render()
    server.requests()
    with operator(server, items, tmp_path / "log"):
        server.apply([machine("early")])
        wait(server, "jsonpath={.status.nodes}=1", "machinetype/early")
        node(server, "late")
        wait(server, "jsonpath={.status.nodes}=2", "machinetype/early")
        exercise(server)
    requests = server.requests()
    assert refusals(requests) == []
    granted = rights(items)
    assert granted >= set(UNSEEN)
    assert used(requests) == granted - set(UNSEEN)


@pytest.mark.parametrize("right", UNSEEN, ids=lambda right: right[1])
def test_rights_that_the_server_asks_for_by_itself(helm: Helm, server: Server, right: Right) -> None:
    """With each the operator can make a child, without it not."""
    group, resource, verb = right
    role = one(ordinary(helm.render()), "ClusterRole", NAME)
    child = children(server)[resource if verb == "create" else "services"]
    server.apply([child], "--dry-run=server", f"--as={ACCOUNT}")
    rules = [
        {**rule, "verbs": [each for each in rule["verbs"] if (resource, each) != (rule["resources"][0], verb)]}
        for rule in role["rules"]
    ]
    question = asked(ACCOUNT, verb, f"{group}/{resource}", APPS)
    server.apply([{**role, "rules": [rule for rule in rules if rule["verbs"]]}])
    try:
        server.until([], [question])
        with pytest.raises(ClusterError, match=UNSEEN[right]):
            server.apply([child], "--dry-run=server", f"--as={ACCOUNT}")
    finally:
        server.apply([role])
        server.until([question], [])


def children(server: Server) -> dict[str, Object]:
    """One of each kind, as the operator makes them."""
    server.apply([app("owner", image="x", networkPolicy="DenyAllIngress")])
    raw = json.loads(server.kubectl("get", "dapp/owner", f"--namespace={APPS}", "--output=json"))
    context = Context(DistributedApp.model_validate(raw, by_name=False), raw["metadata"]["uid"], OperatorSettings())
    policy = networkpolicy.build(context)
    assert policy is not None
    built = (deployment.build(context), service.build(context), pdb.build(context), policy)
    return dict(zip(("deployments", "services", "poddisruptionbudgets", "networkpolicies"), built, strict=True))


def test_an_operator_of_some_namespaces_has_rights_in_these_alone(helm: Helm, server: Server, tmp_path: Path) -> None:
    whole, limited = ordinary(helm.render()), ordinary(helm.render({"watchNamespaces": [APPS], "watchNodes": False}))
    server.kubectl("delete", f"clusterrolebinding/{NAME}")
    elsewhere = asked(ACCOUNT, "list", "drumline.dev/distributedapps", "default")
    server.install(limited, [elsewhere, asked(ACCOUNT, "list", "/nodes")])
    try:
        server.requests()
        with operator(server, limited, tmp_path / "log"):
            server.apply([app("limited", image="x")])
            wait(server, "jsonpath={.status.observedGeneration}=1", "dapp/limited")
            wait(server, "create", "deployment/limited")
        requests = server.requests()
        assert refusals(requests) == []
        assert not {right for right in used(requests) if right[1] == "nodes"}
        questions = [asked(ACCOUNT, "list", "drumline.dev/distributedapps", place) for place in (APPS, "default", "")]
        questions += [asked(ACCOUNT, "create", "apps/deployments", place) for place in (APPS, "default", NAMESPACE)]
        questions += [asked(ACCOUNT, "list", "/nodes")]
        assert server.allowed(questions) == [True, False, False, True, False, False, False]
    finally:
        server.kubectl("delete", f"rolebinding/{NAME}-apps", f"--namespace={APPS}")
        server.install(whole)


#: What somebody who has the operator's token cannot do, in any namespace.
FORBIDDEN = [
    *[(verb, "/secrets", "") for verb in ("get", "list", "watch", "create")],
    *[(verb, "/pods", "") for verb in ("create", "patch", "update", "deletecollection")],
    *[(verb, f"/pods/{sub}", "") for verb in ("get", "create") for sub in ("exec", "attach", "portforward", "log")],
    ("create", "/pods/eviction", ""),
    ("create", "/serviceaccounts/token", ""),
    ("impersonate", "/users", ""),
    *[(verb, "/nodes", "") for verb in ("patch", "update", "delete")],
    *[(verb, "/configmaps", "") for verb in ("create", "patch", "update", "delete")],
    *[(verb, "/namespaces", "") for verb in ("list", "create", "delete")],
    *[(verb, "/persistentvolumeclaims", "") for verb in ("get", "create", "delete")],
    *[(verb, "apps/deployments", "") for verb in ("update", "deletecollection")],
    *[(verb, "/services", "") for verb in ("update", "deletecollection")],
    ("delete", "policy/poddisruptionbudgets", ""),
    ("create", "apps/daemonsets", ""),
    ("create", "batch/jobs", ""),
    *[(verb, "drumline.dev/distributedapps", "") for verb in ("create", "update", "patch", "delete")],
    *[(verb, "drumline.dev/machinetypes", "") for verb in ("create", "update", "patch", "delete")],
    ("patch", "drumline.dev/distributedapps/scale", ""),
    *[(verb, "rbac.authorization.k8s.io/clusterroles", "") for verb in ("get", "create", "bind", "escalate")],
    ("create", "rbac.authorization.k8s.io/rolebindings", ""),
    ("patch", "apiextensions.k8s.io/customresourcedefinitions", ""),
    *[(verb, "coordination.k8s.io/leases", "other") for verb in ("get", "update", "delete")],
    ("list", "coordination.k8s.io/leases", ""),
]


def test_what_the_operator_may_not_do(server: Server) -> None:
    questions = [
        asked(ACCOUNT, verb, resource, place, name)
        for verb, resource, name in FORBIDDEN
        for place in (APPS, NAMESPACE, "kube-system")
    ]
    questions += [asked(ACCOUNT, "get", "coordination.k8s.io/leases", APPS, "drumline-operator")]
    answers = server.allowed(questions)
    assert [q["resourceAttributes"] for q, yes in zip(questions, answers, strict=True) if yes] == []


# -- people


@dataclass(frozen=True)
class Person:
    """Somebody with one of the roles, in one namespace or everywhere."""

    name: str
    role: str
    everywhere: bool = False


PEOPLE = [
    Person("watcher", "drumline-viewer"),
    Person("author", "drumline-editor"),
    Person("owner", "drumline-admin"),
    Person("chief", "drumline-admin", everywhere=True),
    Person("guest", "drumline-viewer", everywhere=True),
]
WRITE = ("create", "update", "patch", "delete", "deletecollection")
#: Verbs and resources, with those who may.
TABLE: Mapping[tuple[tuple[str, ...], str], set[str]] = {
    (("get", "list", "watch"), "distributedapps"): {"watcher", "author", "owner", "chief", "guest"},
    (("get",), "distributedapps/status"): {"watcher", "author", "owner", "chief", "guest"},
    (("get",), "distributedapps/scale"): {"watcher", "author", "owner", "chief", "guest"},
    (WRITE, "distributedapps"): {"author", "owner", "chief"},
    (("update", "patch"), "distributedapps/scale"): {"author", "owner", "chief"},
    # The operator's own: nobody else writes a status.
    (("update", "patch"), "distributedapps/status"): set(),
    # These have no namespace, so a right in one is none.
    (("get", "list", "watch"), "machinetypes"): {"chief", "guest"},
    (WRITE, "machinetypes"): {"chief"},
}


def binding(person: Person) -> Object:
    where = {} if person.everywhere else {"namespace": APPS}
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding" if person.everywhere else "RoleBinding",
        "metadata": {"name": person.name, **where},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": person.role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": person.name}],
    }


def test_what_people_may_do(server: Server) -> None:
    """That these are added to `view`, `edit` and `admin` is seen in e2e/scenarios/test_chart.py: a controller does it."""
    server.apply(map(binding, PEOPLE))
    cases = [
        (person.name, verb, resource, place, person.name in who and (person.everywhere or place == APPS))
        for (verbs, resource), who in TABLE.items()
        for verb in verbs
        for person in PEOPLE
        for place in ((APPS, NAMESPACE) if resource.startswith("distributedapps") else ("",))
    ]
    answers = server.allowed([asked(name, verb, f"drumline.dev/{what}", place) for name, verb, what, place, _ in cases])
    wrong = [case for case, answer in zip(cases, answers, strict=True) if case[-1] != answer]
    assert not wrong
