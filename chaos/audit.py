"""Checkpoints: with no request in flight a server holds what it held when it was new, however much has happened."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos import room
from chaos.clients import Clients
from chaos.model import Ledger, growth
from chaos.supervisor import Pod

#: Descriptors beyond those of a new server that are no leak: a thread pool's and a resolver's come with the first use.
_SLACK = 4
#: Growth of the server's memory over its life, in MiB per 100 faults, that is a leak.
_SLOPE = 8.0


@dataclass(frozen=True)
class Sample:
    """One checkpoint.

    Attributes:
        fault: faults so far.
        life: of the server.
        descriptors: of the server, without connections of clients.
        threads: of the server.
        memory: resident, of the server alone, in MiB; without files and shared memory, which ranks fill.
    """

    fault: int
    life: int
    descriptors: int
    threads: int
    memory: float


@dataclass
class Auditor:
    """Takes samples and notes what is too much."""

    pod: Pod
    clients: Clients
    ledger: Ledger
    samples: list[Sample] = field(default_factory=list)

    async def look(self, fault: int) -> None:
        """Let all requests end, and look at what is there."""
        await self.clients.pause()
        await self.pod.ready()
        # The request of a client that has left ends when the ranks have come to their next step boundary. The server has
        # read it before it reads one from a connection that is made now, and it takes one after the other: when that one
        # is answered, no earlier one may be left.
        if (answered := await self.pod.ask()) != 200:
            self.ledger.wrongs.append(f"after fault {fault}: with nobody else there a request was answered {answered}")
        status = await self.pod.ready()
        try:
            self._look(fault, int(status["inFlight"]) + int(status["queueDepth"]))
        except psutil.NoSuchProcess:
            self.ledger.wrongs.append(f"after fault {fault}: a process of an idle server is gone")
        self.ledger.judge_log(self.pod.take_log())
        await self.clients.resume()

    def _look(self, fault: int, requests: int) -> None:
        where = f"after fault {fault}"
        server = psutil.Process(self.pod.process.pid)
        held = _held(server)
        memory = server.memory_info()
        own = (memory.rss - memory.shared) / 2**20
        sample = Sample(fault, self.pod.lives, sum(held.values()), server.num_threads(), own)
        self.samples.append(sample)
        wrongs = self.ledger.wrongs
        if requests:
            wrongs.append(f"{where}: {requests} requests in flight that no client waits for")
        if len(family := self.pod.family()) != 2 + self.pod.ranks:
            wrongs.append(f"{where}: {[(p.pid, p.ppid(), p.cmdline()[:3]) for p in family]}")
        if sample.descriptors > self.samples[0].descriptors + _SLACK:
            wrongs.append(f"{where}: {sample.descriptors} descriptors, {self.samples[0].descriptors} at first: {held}")
        if room.inside() and (names := [name for name in os.listdir(room.SHM) if not name.startswith("chaos-")]):
            wrongs.append(f"{where}: {names[:5]} in {room.SHM}")
        if len(files := os.listdir(self.pod.temp)) > 1:
            wrongs.append(f"{where}: {files[:5]} in the temporary folder, one is the runner's")
        if len(stores := [path for path in self.pod.temp.rglob("*") if path.is_file()]) > 1:
            wrongs.append(f"{where}: {[path.name for path in stores][:5]}: one store per group")

    def slopes(self) -> dict[int, float]:
        """Return the growth of the server's memory in MiB per 100 faults, per life with five samples or more."""
        lives: dict[int, list[tuple[int, float]]] = {}
        for sample in self.samples:
            lives.setdefault(sample.life, []).append((sample.fault, sample.memory))
        # The first sample of a life is of a server that has not been used.
        return {life: 100 * growth(points[1:]) for life, points in lives.items() if len(points) >= 5}

    def conclude(self) -> None:
        """Note a life in which memory grew all the time, and a log without what every request prints."""
        if self.ledger.logged == 0:
            self.ledger.wrongs.append("no request has printed anything: the check of the log sees nothing")
        for life, slope in self.slopes().items():
            if slope > _SLOPE:
                self.ledger.wrongs.append(f"life {life} of the server grew by {slope:.1f} MiB per 100 faults")


def _held(process: psutil.Process) -> Counter[str]:
    """Return what the process has open, by kind; connections of clients are left out."""
    clients = {connection.fd for connection in process.net_connections("tcp") if connection.status != "LISTEN"}
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if int(entry.name) not in clients:
            kinds[target.partition(":")[0]] += 1
    return kinds
