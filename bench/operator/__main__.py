"""``python -m bench.operator``: measure the operator on a real control plane, print the table, save it as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

import yaml
from e2e.cluster import fake_nodes, pins
from e2e.cluster.local import LocalCluster
from e2e.cluster.machine import obstacle
from e2e.cluster.store import Store

from bench.operator import apps, measures, runners
from bench.operator.api import Api, path_of
from bench.operator.measures import Bench, WrittenTo
from bench.report import Row, machine, save, table
from drumline_operator.crd import custom_resource_definitions

SLICE, ALL = 100, 1000


async def run(bench: Bench, rounds: int, counts: list[int]) -> list[Row]:
    """Measure everything; what fails ends it."""
    rows: list[Row] = []

    async def add(what: str, measured: Awaitable[list[Row]]) -> None:
        began = time.perf_counter()
        print(f"{what:40}", end="", file=sys.stderr, flush=True)
        rows.extend(await measured)
        print(f"{time.perf_counter() - began:5.0f} s", file=sys.stderr, flush=True)

    async with runners.serving(bench.address, apps.RUNNER_PORT):
        if rounds:
            await add("one app on a real node", measures.one_app(bench, rounds))
        await add("an operator without apps", measures.idle_without_apps(bench))
        for count in counts:
            await add(f"{count} apps on fake nodes", measures.many_apps(bench, count))
    return rows


async def _prepare(api: Api) -> None:
    """Have the custom resources, the namespaces, and the MachineType of the fake nodes."""
    for text in custom_resource_definitions().values():
        await api.have(yaml.safe_load(text))
    async with api.follow("CustomResourceDefinition", "", measures.established, whole=True) as found:
        await found.count(len(custom_resource_definitions()), "custom resources", 30)
    for namespace in (apps.NAMESPACE, apps.FLOOR, "drumline-system"):
        await api.have({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    await api.have(apps.machine_type())


def main() -> int:
    """Measure, print, save; 1 when something was written that had to be left alone, or a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{SLICE} apps instead of {ALL}, one round; no goals")
    parser.add_argument("--rounds", type=int, help="of the bench of one app (default 7, with --quick 1; 0: none)")
    parser.add_argument("--apps", type=int, nargs="+", metavar="N", help=f"how many (default {SLICE} {ALL})")
    parser.add_argument("--no-floor", action="store_true", help="many apps without the plain client beside them")
    parser.add_argument("--name", help="save as bench/results/NAME.json (default: operator, with --quick nothing)")
    args = parser.parse_args()
    counts = args.apps or ([SLICE] if args.quick else [SLICE, ALL])
    rounds = args.rounds if args.rounds is not None else (1 if args.quick else 7)
    if reason := obstacle():
        print(f"not possible here: {reason}", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    facts = machine()
    if facts["load_average"] > 0.5 * facts["usable_cores"]:
        print(f"the machine is busy (load {facts['load_average']}): figures will be rough", file=sys.stderr)
    cluster = LocalCluster()
    ran = cluster.kubeconfig.exists()
    cluster.up()
    try:
        store = Store()
        store.ensure(["probe", "kwok"])
        cluster.load_image(store.image("probe"))
        fake_nodes.have(cluster, -(-max(counts) // apps.GPUS_PER_NODE), gpus=apps.GPUS_PER_NODE)
        rows = asyncio.run(_measured(cluster, rounds, counts, quick=args.quick, floor=not args.no_floor))
    except WrittenTo as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        if ran:
            fake_nodes.have(cluster, 0)
        else:
            cluster.down()
    print(table(rows))
    if name := args.name or (None if args.quick else "operator"):
        path: Path = save(rows, name, rounds=rounds, quick=args.quick, facts=facts)
        print(f"saved as {path.relative_to(path.parents[2])}")
    return 0


async def _measured(cluster: LocalCluster, rounds: int, counts: list[int], *, quick: bool, floor: bool) -> list[Row]:
    async with Api(cluster.kubeconfig) as api:
        await _prepare(api)
        with tempfile.TemporaryDirectory() as folder:
            kubeconfig = Path(folder) / "kubeconfig"
            await _log_in(api, cluster.kubeconfig, kubeconfig)
            address, image = cluster.network.host_address, pins.image_reference("probe")
            return await run(Bench(api, kubeconfig, address, image, quick, floor), rounds, counts)


async def _log_in(api: Api, administrator: Path, kubeconfig: Path) -> None:
    """Write a kubeconfig with the token of a service account, which is what an operator in a pod has."""
    meta = {"name": "bench", "namespace": "drumline-system"}
    await api.have({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    subject = {"kind": "ServiceAccount", **meta}
    binding = {"kind": "ClusterRoleBinding", "metadata": {"name": "bench"}, "roleRef": role, "subjects": [subject]}
    await api.have({"apiVersion": "rbac.authorization.k8s.io/v1", **binding})
    path = f"{path_of('ServiceAccount', meta['namespace'], meta['name'])}/token"
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
    _write(kubeconfig, administrator, (await api.call("POST", path, asked))["status"]["token"])


def _write(kubeconfig: Path, administrator: Path, token: str) -> None:
    config = yaml.safe_load(administrator.read_text())
    config["users"][0]["user"] = {"token": token}
    kubeconfig.touch(0o600)
    kubeconfig.write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
