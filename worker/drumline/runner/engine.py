"""Performs the state machine's effects: between :class:`Group` (decides), :class:`Incarnation` (processes), tickets."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import msgspec

from drumline import protocol
from drumline.codec import Packed
from drumline.errors import DrumlineError, EncodingError, RankLost, SetupFailed
from drumline.runner import effects, verdicts
from drumline.runner.effects import Answer
from drumline.runner.hang import HangWatch
from drumline.runner.incarnation import Incarnation, make_on_report
from drumline.runner.nursery import NurseryHandle
from drumline.runner.nursery_process import Asked, directory_for
from drumline.runner.observer import Observer
from drumline.runner.plan import Plan
from drumline.runner.state import Group, State
from drumline.runner.ticket import Ticket

log = logging.getLogger("drumline.runner")

_NEWEST = 0.1  # its weight in the mean of run times


class Engine:
    """Runs one group on the event loop that it is made on."""

    def __init__(self, group: Group, plan: Plan, observers: list[Observer], on_change: Callable[[], None]) -> None:
        self.group = group
        self.plan = plan
        self.incarnation: Incarnation | None = None
        self.nursery: NurseryHandle | None = None
        self.tickets: dict[int, Ticket] = {}
        self.started: asyncio.Future[None]
        self.ended: asyncio.Future[None]
        self.loop = asyncio.get_running_loop()
        self.now = time.monotonic
        self._observers = observers
        self._on_change = on_change
        self._pending: deque[effects.Effect] = deque()
        self._over: deque[Ticket] = deque()
        self._performing = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory: str | None = None  # private; the nursery removes it, too, when this process dies first
        self._flight: Ticket | None = None
        self._flight_sequence = 0
        self._hang = HangWatch(group, plan.hang_timeout, self._lost, self.spawn_task)
        self._renew_nursery = False
        self.mean_run_time = 0.5  # a guess, until some have run

    # -- effects

    def perform(self, effects: Iterable[effects.Effect]) -> None:
        """Perform ``effects`` in order, then what they cause; the ranks' next call goes before the answer to the last."""
        self._pending.extend(effects)
        if self._performing:
            return
        self._performing = True
        try:
            while self._pending:
                self._perform(self._pending.popleft())
        finally:
            self._performing = False
            while self._over:  # whatever went wrong: those that are over have an answer
                ticket = self._over.popleft()
                ticket.tell()
                for observer in self._observers:
                    observer.request_finished(ticket)

    def _perform(self, effect: effects.Effect) -> None:
        if isinstance(effect, effects.Send):
            self._send(effect)
        elif isinstance(effect, effects.Resolve):
            self._resolve(effect.number, effect.error)
        else:
            self._perform_rare(effect)

    def _perform_rare(self, effect: effects.Effect) -> None:
        match effect:
            case effects.StopRequest() if self.incarnation is not None:
                self.incarnation.page.request_stop(effect.sequence)
            case effects.Arm():
                self._disarm(effect.timer)
                self._timers[effect.timer] = self.loop.call_later(effect.seconds, self._fired, effect.timer)
            case effects.Disarm():
                self._disarm(effect.timer)
            case effects.Launch():
                self.spawn_task(self._launch(effect.incarnation))
            case effects.Kill():
                self._kill()
            case effects.SendTeardown() if self.incarnation is not None:
                self.incarnation.channel.send(range(self.group.world_size), protocol.encode(protocol.Teardown()))
            case effects.Started() if not self.started.done():
                if effect.error is None:
                    self.started.set_result(None)
                else:
                    self.started.set_exception(effect.error)
                    self.started.exception()
            case effects.Restarting():
                log.warning("restarting the group: %s", self.group.last_failure)
                for observer in self._observers:
                    observer.group_restarted(effect.reason)
            case effects.GaveUp():
                log.error("giving up after %d restarts: %s", self.group.restarts, effect.error)
            case effects.Ended() if not self.ended.done():
                self.ended.set_result(None)
        if not isinstance(effect, effects.Arm | effects.Disarm):
            self._on_change()

    def spawn_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run ``coroutine`` until it ends or the engine is closed."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _disarm(self, timer: str) -> None:
        handle = self._timers.pop(timer, None)
        if handle is not None:
            handle.cancel()

    def _fired(self, timer: effects.Timer) -> None:
        self._timers.pop(timer, None)
        self.perform(self.group.fired(timer, self.now(), self.incarnation.laggards({}) if self.incarnation else ()))

    # -- start and end of processes

    def start(self) -> None:
        """Begin the first start; ``started`` tells how it went."""
        self.started, self.ended = self.loop.create_future(), self.loop.create_future()
        self.perform(self.group.start())

    def prepare_nursery(self) -> NurseryHandle:
        """Return the living nursery, starting one if there is none."""
        asked = Asked(self.plan.reference, self.plan.cwd, self.plan.method)
        if self._directory is None:
            self._directory = directory_for(asked)
        if self.nursery is None or not self.nursery.alive:
            new = NurseryHandle(self._directory, make_on_report(lambda: self.incarnation), self._nursery_lost)
            new.start(asked)
            self.nursery = new
        return self.nursery

    def reload(self) -> None:
        """Replace the nursery, which holds the old code, and the ranks."""
        self._renew_nursery = True
        self.perform(self.group.renew())

    async def _launch(self, number: int) -> None:
        self._arm_startup(number)
        try:
            if self.nursery is not None and (self._renew_nursery or not self.nursery.alive):
                self._renew_nursery = False
                old, self.nursery = self.nursery, None
                await old.close()
            nursery = self.prepare_nursery()
            description = await nursery.preloaded()
            if description.kind == "app":
                raise SetupFailed("the target is an App, not a DistributedWorker; run it with `drumline run`", rank=-1)
            if self._directory is None or number != self.group.incarnation or self.group.state == State.STOPPING:
                self._no_processes(number)
                return
            template = msgspec.structs.replace(
                self.plan.template,
                reference=description.reference,
                store=os.path.join(self._directory, f"store-{number}"),
            )
            channel = self.plan.make_channel(number)
            self.incarnation = incarnation = Incarnation(number, nursery, channel, template, self)
            incarnation.launch()
            data, buffers = self.plan.setup
            message = protocol.encode(protocol.Setup(data, self.plan.warmup))
            incarnation.channel.send(range(self.group.world_size), message, buffers)
            self._on_change()
        except DrumlineError as error:
            self._launch_failed(error, number)
        except Exception as error:
            log.exception("the group could not be started")
            self._launch_failed(SetupFailed(str(error), rank=-1, exception_type=type(error).__name__), number)

    def _launch_failed(self, error: DrumlineError, number: int) -> None:
        if number != self.group.incarnation:
            return  # a launch that was given up long ago
        self.perform(self.group.lost(error, self.now()))
        self._no_processes(number)

    def _no_processes(self, number: int) -> None:
        if self.incarnation is None or self.incarnation.number != number:
            self.on_gone()

    def _arm_startup(self, number: int) -> None:
        self._disarm("startup")
        self._timers["startup"] = self.loop.call_later(self.plan.startup_timeout, self._startup_expired, number)

    def _startup_expired(self, number: int) -> None:
        self._timers.pop("startup", None)
        if number == self.group.incarnation and self.group.state in (State.STARTING, State.RESTARTING):
            self.spawn_task(self._setup_too_slow(number))

    async def _setup_too_slow(self, number: int) -> None:
        limit = f"{self.plan.startup_timeout:g} s"
        text = f"setup() did not return within {limit}"
        incarnation = self.incarnation
        if incarnation is None or incarnation.number != number:
            if self.nursery is not None:
                self.nursery.kill()
                self._renew_nursery = True
            error = SetupFailed(f"importing the worker's module took longer than {limit}", rank=-1)
            self._launch_failed(error, number)
            return
        stacks = await incarnation.collect_stacks()
        missing = sorted(set(range(self.group.world_size)) - self.group.ready_ranks)
        if self.incarnation is not incarnation or not missing:
            return
        rank = incarnation.behind(missing, stacks)
        error = SetupFailed(
            f"{text} on rank {', '.join(map(str, missing))}", rank=rank, remote_traceback=stacks.get(rank, "")
        )
        self.perform(self.group.lost(error, self.now()))

    def _kill(self) -> None:
        incarnation = self.incarnation
        if incarnation is not None and incarnation.number == self.group.incarnation:
            incarnation.kill()
        elif self.group.state in (State.STOPPING, State.FAILED):
            self.loop.call_soon(self.on_gone)

    def _nursery_lost(self) -> None:
        if self.incarnation is not None:
            error = RankLost(-1, reason="ParentLost", message="the ranks' parent process ended, and they with it")
            self.perform(self.group.lost(error, self.now()))  # the cause comes first: ranks that ended are not to blame
            self.incarnation.nursery_lost()

    async def close(self) -> None:
        """Release everything; every process is gone afterwards."""
        for timer in list(self._timers):
            self._disarm(timer)
        self._hang.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.incarnation is not None:
            self.incarnation.close()
        if self.nursery is not None:
            await self.nursery.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def abandon(self) -> None:
        """At interpreter exit without ``stop()``: end all processes, wait for nothing else."""
        if self.incarnation is not None:
            self.incarnation.close()
        if self.nursery is not None:
            self.nursery.abandon()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    # -- requests

    def add(self, ticket: Ticket) -> None:
        """Give the group a new request."""
        self.tickets[ticket.number] = ticket
        for observer in self._observers:
            observer.request_queued(ticket)
        self.perform(self.group.submit(ticket.number, ticket.caller))

    def _send(self, effect: effects.Send) -> None:
        ticket, incarnation = self.tickets[effect.number], self.incarnation
        assert incarnation is not None
        payload = ticket.payload
        assert payload is not None
        ticket.started_at = now = self.now()
        ticket.queue_wait = now - ticket.queued_at
        self._flight, self._flight_sequence = ticket, effect.sequence
        incarnation.set_request_id(ticket.request_id)
        call = protocol.Call(
            effect.sequence, ticket.request_id, payload.data, ticket.streaming, ticket.images, ticket.deadline,
            ticket.headers,
        )  # fmt: skip
        try:
            incarnation.channel.send(range(self.group.world_size), protocol.encode(call), payload.buffers)
        except OSError as error:  # no memory or no descriptor for it: no rank has any of it, so each is done with it
            answer = Answer(error=EncodingError(f"the payload cannot be handed to the ranks: {error}"))
            for rank in range(self.group.world_size):
                self._answered(rank, effect.sequence, answer)
        self._hang.watch(incarnation, effect.sequence, now)
        for observer in self._observers:
            observer.request_started(ticket)

    def _resolve(self, number: int, error: DrumlineError | None) -> None:
        ticket = self.tickets.pop(number)
        if error is None and ticket.value is None:
            ticket.value = Packed(b"\xc0", [])
        ticket.finish(error)
        if error is None and ticket.run_time is not None:
            self.mean_run_time += (ticket.run_time - self.mean_run_time) * _NEWEST
        self._over.append(ticket)

    # -- events of the incarnation

    def on_message(self, rank: int, data: bytes, buffers: list[Any]) -> None:
        """See :class:`drumline.runner.incarnation.Events`."""
        try:
            message = protocol.decode_rank_message(data)
        except (ValueError, RecursionError) as error:  # broken UTF-8 is a ValueError, but no error of msgspec's
            self._lost(RankLost(rank, reason="Protocol", message=f"rank {rank} sent what is no message: {error}"))
            return
        if isinstance(message, protocol.Returned):
            flight = self._flight
            if rank == 0 and flight is not None and message.sequence == self._flight_sequence:
                flight.value = Packed(message.value, buffers)
            self._answered(rank, message.sequence, Answer(message.collectives))
        elif isinstance(message, protocol.Update):
            self._update(message, buffers)
        else:
            self._on_rare_message(rank, message)

    def _on_rare_message(self, rank: int, message: protocol.RankMessage) -> None:
        match message:
            case protocol.Raised():
                error, peer = verdicts.from_failure(rank, message.failure)
                self._answered(rank, message.sequence, Answer(message.collectives, error, peer))
            case protocol.Stopped():
                if self._flight is not None and message.sequence == self._flight_sequence:
                    self._flight.stopped_steps[rank] = message.step
                self._answered(rank, message.sequence, Answer(message.collectives, step=message.step))
            case protocol.Ready():
                self._ready(rank, message)
            case protocol.SetupRaised():
                setup_error, peer = verdicts.from_setup(rank, message.failure)
                self.perform(self.group.setup_failed(rank, setup_error, peer=peer, now=self.now()))
            case protocol.TornDown():
                torn = verdicts.from_failure(rank, message.failure)[0] if message.failure else None
                self.perform(self.group.torn_down(rank, torn))

    def _update(self, message: protocol.Update, buffers: list[Any]) -> None:
        ticket = self._flight
        if ticket is None or message.sequence != self._flight_sequence:
            return
        if ticket.first_event_at is None:
            ticket.first_event_at = self.now()
            for observer in self._observers:
                observer.first_event(ticket, ticket.first_event_at - ticket.queued_at)
        ticket.push(Packed(message.value, buffers))

    def _answered(self, rank: int, sequence: int, answer: Answer) -> None:
        assert self.incarnation is not None
        self.incarnation.drain_output(rank)
        self.perform(self.group.answered(rank, sequence, answer, self.now()))

    def _ready(self, rank: int, message: protocol.Ready) -> None:
        assert self.incarnation is not None
        incarnation = self.incarnation
        incarnation.ranks[rank].state, incarnation.ranks[rank].device = "ready", message.device
        effects = self.group.rank_ready(rank)
        if self.group.state == State.READY and len(self.group.ready_ranks) == self.group.world_size:
            self._disarm("startup")
            seconds = self.now() - incarnation.launched_at
            log.info("%d ranks ready on %s (%s) after %.2f s", self.group.world_size, message.device.split(":")[0],
                     message.backend, seconds)  # fmt: skip
            for observer in self._observers:
                observer.setup_finished(seconds)
        self.perform(effects)
        self._on_change()

    def on_spawned(self, rank: int) -> None:
        """See :class:`drumline.runner.incarnation.Events`."""
        self._on_change()

    def on_exited(self, rank: int, exit_code: int | None, number: int | None) -> None:
        """See :class:`drumline.runner.incarnation.Events`."""
        self.perform(self.group.exited(rank, RankLost(rank, exit_code=exit_code, signal=number), self.now()))
        self._on_change()

    def on_paused(self, rank: int, paused: bool) -> None:
        """See :class:`drumline.runner.incarnation.Events`."""
        assert self.incarnation is not None
        self._hang.paused(self.incarnation, rank, paused)
        self._on_change()

    def _lost(self, error: DrumlineError) -> None:
        self.perform(self.group.lost(error, self.now()))

    def on_gone(self) -> None:
        """See :class:`drumline.runner.incarnation.Events`."""
        self._hang.forget_paused()
        self._flight = None
        self.perform(self.group.gone())
        self._on_change()
