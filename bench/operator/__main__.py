"""``python -m bench.operator``: measure the operator on a real control plane, print the table, save it as JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import yaml
from e2e.cluster import fake_nodes, pins
from e2e.cluster.local import LocalCluster
from e2e.cluster.store import Store

from bench.operator import apps, measures, runners
from bench.operator.api import Api
from bench.operator.measures import Bench, WrittenTo
from bench.report import Row, machine, save, table
from drumline_operator.crd import custom_resource_definitions

SLICE, ALL = 100, 1000


async def run(bench: Bench, rounds: int, counts: list[int]) -> list[Row]:
    """Measure everything; what fails ends it."""
    await _prepare(bench.api)
    rows: list[Row] = []

    async def add(what: str, measured: Awaitable[list[Row]]) -> None:
        began = time.perf_counter()
        print(f"{what:40}", end="", file=sys.stderr, flush=True)
        rows.extend(await measured)
        print(f"{time.perf_counter() - began:5.0f} s", file=sys.stderr, flush=True)

    async with runners.serving(bench.address, apps.RUNNER_PORT):
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
    parser.add_argument("--rounds", type=int, help="of the bench of one app (default 7, with --quick 1)")
    parser.add_argument("--apps", type=int, nargs="+", metavar="N", help=f"how many (default {SLICE} {ALL})")
    parser.add_argument("--name", help="save as bench/results/NAME.json (default: operator, with --quick nothing)")
    args = parser.parse_args()
    counts = args.apps or ([SLICE] if args.quick else [SLICE, ALL])
    rounds = args.rounds or (1 if args.quick else 7)
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
        rows = asyncio.run(_measured(cluster, rounds, counts, args.quick))
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


async def _measured(cluster: LocalCluster, rounds: int, counts: list[int], quick: bool) -> list[Row]:
    async with Api(cluster.kubeconfig) as api:
        address = cluster.network.host_address
        bench = Bench(api, cluster.kubeconfig, address, pins.image_reference("probe"), quick)
        return await run(bench, rounds, counts)


if __name__ == "__main__":
    sys.exit(main())
