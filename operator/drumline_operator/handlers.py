"""kopf as the watch layer of DistributedApps and MachineTypes: what it sees goes to a sink, and nothing else happens.

Only ``on.event`` handlers: kopf then puts no finalizer, annotation or status on users' objects and posts no events. It
runs in a thread of its own, because when it ends it cancels every task of the event loop that it runs in.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import kopf
import uvloop

from drumline.api.v1alpha1 import GROUP

log = logging.getLogger(__name__)

KINDS: Final = {"distributedapps": "DistributedApp", "machinetypes": "MachineType"}
#: Seconds between two starts of kopf after it has ended by itself, and for its end when it is asked to.
_BASE, _LONGEST, _STOP = 0.5, 30.0, 3.0
#: Seconds: longer than kopf tries a call again before it gives up, and than an event may take.
_SETTLED: Final = 30.0
_HANGS: Final = "it shows nothing of what a list shows, as with credentials that the API server does not take"

Sink = Callable[[str, str, Mapping[str, Any]], None]
#: By kind, the versions of objects by their uids.
Versions = Mapping[str, Mapping[str, int]]
Login = Callable[[], Awaitable[Mapping[str, Any]]]


class Watch:
    """Watches both kinds until cancelled.

    Args:
        login: returns the fields of :class:`kopf.ConnectionInfo`; asked anew when they no longer work.
        sink: gets kind, type of event (ADDED, MODIFIED, DELETED; None for what a list shows) and object, in the event loop
            that :meth:`run` runs in.
        namespaces: where apps are watched; empty: everywhere.
        settled: seconds after which kopf runs well if it has not ended, and after which it hangs if it has not shown what
            others have seen.
    """

    def __init__(self, login: Login, sink: Sink, namespaces: Sequence[str] = (), *, settled: float = _SETTLED) -> None:
        self._login, self._sink, self._namespaces, self._settled = login, sink, tuple(namespaces), settled
        self._why = ""
        self._failures = 0
        self._shown: dict[str, int] = {}
        self._starts = 0
        self._hung = False
        self._enough = asyncio.Event()

    def wrong(self) -> list[str]:
        """Return what is wrong: kopf hangs, or ends again and again, so that apps are not seen. One end is no trouble yet."""
        if self._hung:
            return [f"kopf hangs: {_HANGS}"]
        return [f"kopf ends again and again: {self._why}"] if self._failures > 1 else []

    async def supervise(self, known: Callable[[], Versions], list_again: Callable[[], Awaitable[None]]) -> None:
        """Find out that kopf hangs, until cancelled; :meth:`run` then starts it again.

        Some failures, such as a refused login, stop parts of kopf without ending it.

        Args:
            known: returns what is known, whoever has shown it.
            list_again: returns when ``known`` no longer has what is gone.
        """
        while True:
            before, starts = known(), self._starts
            await asyncio.sleep(self._settled)
            if not self._unseen(before, known()):
                continue
            await list_again()  # which also takes as long as the API server is away
            await asyncio.sleep(self._settled)
            unseen = self._unseen(before, known())
            if unseen and starts == self._starts:
                log.error("kopf hangs and is started again: %s (%s)", _HANGS, ", ".join(unseen))
                self._hung = True
                self._enough.set()

    def _unseen(self, before: Versions, now: Versions) -> list[str]:
        """The kinds of which kopf has shown nothing so new as an object that has not changed meanwhile."""
        return [
            kind
            for kind, versions in before.items()
            if any(
                version > self._shown.get(kind, 0) and now.get(kind, {}).get(uid) == version
                for uid, version in versions.items()
            )
        ]

    def _show(self, kind: str, type: str, raw: Mapping[str, Any]) -> None:
        if self._hung:
            self._hung = False
            log.info("kopf runs again")
        self._shown[kind] = max(self._shown.get(kind, 0), int(raw["metadata"].get("resourceVersion") or 0))
        self._sink(kind, type, raw)

    async def run(self) -> None:
        """Run kopf, and start it again when it ends or hangs."""
        loop = asyncio.get_running_loop()
        while True:
            ended, stop = asyncio.Event(), threading.Event()
            self._shown.clear()
            self._enough.clear()
            self._starts += 1
            thread = threading.Thread(target=self._thread, args=(loop, ended, stop), name="kopf", daemon=True)
            thread.start()
            try:
                await self._end(ended)
            finally:
                stop.set()
                if not ended.is_set():
                    # Bounded: the thread is a daemon, and has nothing that could be lost.
                    await asyncio.wait([asyncio.ensure_future(ended.wait())], timeout=_STOP)
            if self._hung:
                continue
            self._failures += 1
            log.log(
                logging.ERROR if self._failures > 1 else logging.WARNING,
                "kopf ended and is started again (%d times in a row): %s",
                *(self._failures, self._why),
            )
            await asyncio.sleep(min(_LONGEST, _BASE * 2.0 ** min(self._failures, 16)))

    async def _end(self, ended: asyncio.Event) -> None:
        waits = {asyncio.ensure_future(event.wait()) for event in (ended, self._enough)}
        try:
            done, _ = await asyncio.wait(waits, timeout=self._settled, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                if self._failures:
                    log.info("kopf runs again")
                self._failures = 0
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    def _thread(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Event, stop: threading.Event) -> None:
        self._why = "it says nothing"
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._kopf(loop, stop))
        except Exception as error:
            self._why = f"{type(error).__name__}: {error}"
        finally:
            _tell(loop, ended.set)

    async def _kopf(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        registry = kopf.OperatorRegistry()

        async def login(**_: Any) -> kopf.ConnectionInfo:
            return _Connection(**await self._login())

        kopf.on.login(registry=registry)(login)
        for plural, kind in KINDS.items():

            async def seen(event: Any, kind: str = kind, **_: Any) -> None:
                _tell(loop, self._show, kind, event["type"], event["object"])

            kopf.on.event(GROUP, "v1alpha1", plural, id=plural, registry=registry)(seen)
        await kopf.operator(
            registry=registry,
            settings=_settings(),
            identity="drumline-operator",  # type: ignore[arg-type] # else the user's name, and in a pod there may be none
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=stop,
        )


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # which kinds and namespaces there are is known
    settings.process.ultimate_exiting_timeout = None  # the process's end is ours
    settings.queueing.exit_timeout = 0.5
    settings.queueing.idle_timeout = 1.0
    settings.watching.connect_timeout = 10.0
    settings.networking.request_timeout = 30.0
    settings.networking.error_backoffs = (0.5, 1, 2, 4, 8)
    settings.persistence.diffbase_storage = _NoDiffs()
    return settings


class _Connection(kopf.ConnectionInfo):
    """Python 3.13 refuses certificate authorities that kubectl takes, and that older clusters have."""

    def as_ssl_context(self) -> ssl.SSLContext:
        """Return what TLS is made with."""
        context = super().as_ssl_context()
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context


class _NoDiffs(kopf.DiffBaseStorage):
    """Nobody here asks kopf what has changed, and its copies of whole objects cost more than all else of an event."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        if not loop.is_closed():  # it ended first: nobody listens any more
            raise
