"""What all processes of a server do while nobody asks for anything: wake-ups of every thread, and CPU time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import floors
from bench.group import RANKS, beside
from bench.processes import Served, family
from bench.program import Program
from bench.report import Row

#: The thread of torch's gloo transport, which waits for its sockets 10 ms at a time whatever it is told.
GLOO = "gloo_tcp_loop"


@dataclass(frozen=True)
class Effort:
    """How much is measured in one round."""

    seconds: float = 10.0


@dataclass(frozen=True)
class Work:
    """What threads did since they began, by their names.

    Attributes:
        wakeups: how often they went to sleep by themselves, and so woke up.
        cpu: seconds on a core.
    """

    wakeups: Counter[str]
    cpu: dict[str, float]


def work_of(pids: list[int]) -> Work:
    """Read ``/proc``."""
    wakeups: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            name = (task / "comm").read_text().strip()
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            wakeups[name] += int(status["voluntary_ctxt_switches"])
            cpu[name] += int((task / "schedstat").read_text().split()[0])
    return Work(wakeups, {name: nanoseconds / 1e9 for name, nanoseconds in cpu.items()})


@dataclass(frozen=True)
class Rates:
    """What happened in a while: wake-ups a second, and percent of one core; torch's polling thread apart."""

    ours: float
    gloo: float
    ours_cpu: float
    gloo_cpu: float
    names: str


async def watch(pid: int, seconds: float) -> Rates:
    """Watch a process and all that it started for ``seconds``."""
    pids = [process.pid for process in family(pid)]
    before = work_of(pids)
    await asyncio.sleep(seconds)  # what is measured is this silence
    after = work_of(pids)
    woken = after.wakeups - before.wakeups
    gloo = woken.pop(GLOO, 0)
    cpu = {name: used - before.cpu.get(name, 0.0) for name, used in after.cpu.items()}
    gloo_cpu = cpu.pop(GLOO, 0.0)
    names = ", ".join(f"{name} {count}" for name, count in woken.most_common())
    percent = 100 / seconds
    return Rates(woken.total() / seconds, gloo / seconds, sum(cpu.values()) * percent, gloo_cpu * percent, names)


@contextmanager
def _floors() -> Iterator[tuple[Served, int]]:
    with floors.BareFastAPI() as bare, floors.Gloo(RANKS) as gloo_pid:
        yield bare, gloo_pid


async def idles(rounds: int, effort: Effort) -> AsyncIterator[Row]:
    """A server that has answered a request, then silence; beside a bare FastAPI server and a bare gloo group."""
    wakeups = Row("idle-wakeups", "wake-ups a second of all our threads", 0, "/s")
    cpu = Row("idle-cpu", "CPU of all our threads", 0.1, "% of a core")
    gloo = Row("idle-gloo", f"wake-ups of torch's {GLOO} / those of a bare gloo group", 1.2)
    async with beside(_floors(), "Echo") as ((bare, gloo_pid), server):
        await server.load({"prompt": floors.PROMPT}, requests=10, warmup=0)
        for _ in range(rounds):
            pids = (bare.process.pid, gloo_pid, server.process.pid)
            floor, torch, ours = await asyncio.gather(*(watch(pid, effort.seconds) for pid in pids))
            wakeups.add(ours.ours, floor_rps=floor.ours)
            wakeups.note = ours.names or wakeups.note
            cpu.add(ours.ours_cpu, floor_pct=floor.ours_cpu)
            gloo.add(ours.gloo / torch.gloo, ours_rps=ours.gloo, floor_rps=torch.gloo, cpu_pct=ours.gloo_cpu)
    for row in (wakeups, cpu, gloo):
        yield row


PROGRAM = Program(
    name="idle",
    title="Idle",
    benches=(idles,),
    full=Effort(),
    quick=Effort(seconds=2.0),
    rounds=3,
    quick_rounds=1,
    intro="All threads of the server, its nursery and two ranks, counted by the kernel. The floor is a bare FastAPI server. "
    f"The one thread that polls is torch's own `{GLOO}`, 100 times a second in every process with a gloo group; ranks on "
    "GPUs have none.",
)
