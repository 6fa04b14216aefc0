"""A pod that calls apps as their users do: curl and the drumline command, from inside the cluster."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from e2e.cluster.errors import ClusterError
from e2e.harness.apps import RESTRICTED_CONTAINER, RESTRICTED_POD
from e2e.harness.kube import LIMIT, Kube, TooLate, has

#: The last line of what a background command writes; in an event stream it is a comment.
_END: Final = ": ended with "
#: A node's rules follow a Service's endpoints with a delay of which nobody is told, and names follow Services so; it is a
#: second or less, but on a busy machine. So long connections may be refused, and names unknown.
PROXY_SECONDS: Final = 90.0
#: For one answer.
ANSWER_SECONDS: Final = 120
#: For a connection: one that is begun before a node's rules are there may never get anywhere, a new one does.
CONNECT_SECONDS: Final = 5
#: Between two calls of a caller, which would otherwise take the CPU from the pods that a test waits for.
PACE_SECONDS: Final = 0.1
#: What curl then says: no such name, no connection, or (where that was asked for) no answer in a short time.
AGAIN: Final = ("curl: (6)", "curl: (7)", "curl: (28)")
#: A shell command that prints the time in nanoseconds.
_NOW: Final = "date +%s%N"
_numbers = itertools.count(1)


def pod(name: str, image: str, command: list[str], **spec: Any) -> dict[str, Any]:
    """A pod of the restricted profile with a writable /tmp.

    Args:
        name: Of the pod, and the value of its label `client`.
        image: With a shell.
        command: What it runs.
        spec: More of its spec.
    """
    container = {
        "name": "client",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "workingDir": "/tmp",
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "securityContext": RESTRICTED_CONTAINER,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"client": name}},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": RESTRICTED_POD,
            **spec,
        },
    }


@dataclass(frozen=True)
class Reply:
    """An HTTP answer. `body` is decoded if it is JSON."""

    status: int
    body: Any


class Client:
    """A pod to call from. It lives as long as its namespace.

    Args:
        kube: The namespace.
        image: With curl and the drumline command.
        name: Of the pod.
        spec: More of its spec.
    """

    def __init__(self, kube: Kube, image: str, name: str = "client", **spec: Any) -> None:
        self.kube, self.name = kube, name
        kube.apply(pod(name, image, ["sleep", "infinity"], **spec))
        self.node: str = kube.until("pod", name, has("Ready", "True"), "the client is ready")["spec"]["nodeName"]

    def run(self, *command: str, input: str | None = None) -> str:
        """Run a command in the pod and return what it prints.

        Raises:
            ClusterError: It failed; the message has its words.
        """
        return self.kube("exec", "--stdin", self.name, "--", *command, input=input)

    def call(self, url: str, payload: Mapping[str, Any] | None = None, *options: str) -> Reply:
        """One request: POST with a payload, else GET. A connection that is refused is tried again for a while.

        Args:
            url: For curl.
            payload: The body.
            options: More of curl's.
        """
        body = [] if payload is None else ["--data", json.dumps(payload)]
        limits = ["--connect-timeout", str(CONNECT_SECONDS), "--max-time", str(ANSWER_SECONDS)]
        line = ["curl", "-sS", *limits, *options, "-w", "\n%{http_code}", *body, url]
        deadline = time.monotonic() + PROXY_SECONDS
        while True:
            try:
                answer = self.run(*line)
                break
            except ClusterError as error:
                if not any(words in str(error) for words in AGAIN) or time.monotonic() > deadline:
                    raise AssertionError(f"no answer from {url}: {error}") from None
        text, _, status = answer.rpartition("\n")
        with contextlib.suppress(ValueError):
            return Reply(int(status), json.loads(text))
        return Reply(int(status), text)

    def call_until(self, url: str, payload: Mapping[str, Any], key: str, value: Any) -> Any:
        """Call until the answer has this value: an older pod may be asked as long as the node's rules lead to it.

        Returns:
            That answer.

        Raises:
            TooLate: None came.
        """
        deadline, found = time.monotonic() + PROXY_SECONDS, Reply(0, {})
        while time.monotonic() < deadline:
            # One that waits there for its turn is given up: whoever goes away is forgotten.
            found = self.call(url, payload, "--max-time", "15")
            if found.status == 200 and found.body[key] == value:
                return found.body
        raise TooLate(f"no answer from {url} with {key}={value}; the last one was {found}")

    def reach(self, url: str) -> None:
        """Wait until this node's rules lead to the Service of a URL; `call` does so by itself."""
        scheme, _, rest = url.partition("://")
        self.call(f"{scheme}://{rest.partition('/')[0]}/healthz")

    def background(self, command: str) -> Background:
        """Run a shell command that goes on whatever becomes of our connection to it."""
        file = f"/tmp/background-{next(_numbers)}"
        inner = f"{command}; printf '\\n{_END}%s\\n' $?"
        self.run("sh", "-c", f"setsid sh -c {shlex.quote(inner)} </dev/null >>{file} 2>&1 &")
        return Background(self, file)

    def stream(self, url: str, payload: Mapping[str, Any]) -> Stream:
        """Begin an event stream with curl, as the README does."""
        self.reach(url)
        line = ["curl", "-sSN", "--max-time", "600", "--data", json.dumps(payload), url]
        return Stream(self.background(shlex.join(line)))

    def load(self, url: str, payload: Mapping[str, Any], callers: int = 2) -> Load:
        """Call again and again, from several callers with a new connection each time, until told to stop."""
        self.reach(url)
        flag = f"/tmp/stop-{next(_numbers)}"
        options = ["--max-time", str(ANSWER_SECONDS), "-w", " %{http_code}", "--data", json.dumps(payload)]
        # The shell writes a whole line at once, curl in parts, between which another caller's may come.
        call = f"printf '%s\\n' \"$({_NOW}) $({shlex.join(['curl', '-sS', *options, url])} 2>&1)\""
        loop = f"while [ ! -e {flag} ]; do {call}; sleep {PACE_SECONDS}; done"
        return Load(self, flag, self.background(" & ".join([loop] * callers) + " & wait"))


class Background:
    """The lines that a command in the client's pod writes, as they come. Our connection may be lost and made anew."""

    def __init__(self, client: Client, file: str) -> None:
        self._client, self._file, self._seen = client, file, 0
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.attach()

    def attach(self) -> None:
        """Go on reading after what has been read; for use after the API server was away."""
        arguments = [
            "kubectl",
            f"--namespace={self._client.kube.namespace}",
            *("exec", self._client.name, "--", "tail", "-c", f"+{self._seen + 1}", "-f", self._file),
        ]
        process = subprocess.Popen(
            arguments, env=self._client.kube.cluster.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                if not line.endswith(b"\n"):
                    break  # cut off in the middle
                self._seen += len(line)
                text = line.decode().rstrip("\n")
                self._lines.put(text)
                if text.startswith(_END):
                    break
            self._lines.put(None)
            process.kill()

    def mark(self, word: str) -> None:
        """Add a line of ours to what the command writes: the word, and the time there."""
        self._client.run("sh", "-c", f'echo "{word} $({_NOW})" >>{self._file}')

    def line(self, limit: float = LIMIT) -> str:
        """The next line.

        Raises:
            TooLate: None came within `limit` seconds.
            ConnectionError: We are cut off from the pod; see `attach`.
        """
        try:
            found = self._lines.get(timeout=limit)
        except queue.Empty:
            raise TooLate(f"the command in {self._client.name} wrote nothing for {limit:.0f} s") from None
        if found is None:
            raise ConnectionError(f"cut off from pod {self._client.name}")
        return found

    def drop(self, limit: float = LIMIT) -> None:
        """Read on until we are cut off, which happens when the API server ends; what comes after is kept."""
        kept = []
        with contextlib.suppress(ConnectionError):
            while True:
                kept.append(self.line(limit))
        for line in kept:
            self._lines.put(line)


@dataclass(frozen=True)
class SseEvent:
    """One server-sent event."""

    event: str
    id: str
    data: Any


@dataclass
class Stream:
    """An event stream that a client reads.

    Attributes:
        events: All that came so far.
        exit_code: curl's, when it has ended: 18 where the connection broke in the middle.
    """

    source: Background
    events: list[SseEvent] = field(default_factory=list)
    exit_code: int | None = None
    words: list[str] = field(default_factory=list)

    def next(self, limit: float = LIMIT) -> SseEvent | None:
        """The next event, or None at the end of the stream."""
        fields: dict[str, str] = {}
        while self.exit_code is None:
            line = self.source.line(limit)
            name, _, value = line.partition(": ")
            if line.startswith(_END):
                self.exit_code = int(line.removeprefix(_END))
            elif line and name in {"event", "id", "data"}:
                fields[name] = value
            elif line and name:  # not a comment: curl's own words, or an answer that is no event stream
                self.words.append(line)
            elif not line and fields:
                found = SseEvent(fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"]))
                self.events.append(found)
                return found
        return None

    def take(self, count: int, limit: float = LIMIT) -> list[SseEvent]:
        """The next `count` events.

        Raises:
            AssertionError: The stream ended before.
        """
        found = [self.next(limit) for _ in range(count)]
        assert None not in found, f"the stream ended early: {self.exit_code} {self.words} {self.events[-3:]}"
        return [each for each in found if each]

    def rest(self, limit: float = LIMIT) -> list[SseEvent]:
        """All events until the end; each may take `limit` seconds."""
        return list(self._rest(limit))

    def _rest(self, limit: float) -> Iterator[SseEvent]:
        while found := self.next(limit):
            yield found

    def result(self, limit: float = LIMIT) -> Any:
        """Read to the end, which must be a good one: updates in order without a gap, then the one result.

        Returns:
            The result.
        """
        self.rest(limit)
        self._check_shape()
        assert self.events[-1].event == "result", self.events[-1]
        return self.events[-1].data

    def error(self, limit: float = LIMIT) -> dict[str, Any]:
        """Read to the end, which must be one error event.

        Returns:
            Its problem.
        """
        self.rest(limit)
        self._check_shape()
        assert self.events[-1].event == "error", self.events[-1]
        found: dict[str, Any] = self.events[-1].data
        return found

    def broken(self, limit: float = LIMIT) -> None:
        """Read to the end, which must be a lost connection: nobody was left to say more."""
        self.rest(limit)
        assert self.exit_code != 0
        assert all(each.event == "update" for each in self.events), self.events[-1]

    def _check_shape(self) -> None:
        assert self.exit_code == 0, (self.exit_code, self.words)
        assert [each.id for each in self.events] == [str(number) for number in range(len(self.events))]
        assert {each.event for each in self.events[:-1]} <= {"update"}, "one terminal event, and it comes last"


class Load:
    """Callers that go on until `stop`. Every answer is kept: nothing that went wrong gets lost.

    Attributes:
        good: All answers with status 200, decoded.
        bad: All others, and what curl said where there was none.
    """

    def __init__(self, client: Client, flag: str, source: Background) -> None:
        self._client, self._flag, self._source = client, flag, source
        self.good: list[Any] = []
        self.bad: list[str] = []
        self._since = 0

    def take(self, count: int, limit: float = LIMIT) -> list[Any]:
        """The next `count` good answers, decoded; after `catch_up` to requests that began after it."""
        found: list[Any] = []
        deadline = time.monotonic() + limit
        while len(found) < count:
            if time.monotonic() > deadline:
                raise TooLate(f"{len(found)} of {count} good answers in {limit:.0f} s; bad ones: {self.bad[-5:]}")
            if self._add(self._source.line(limit)):
                found.append(self.good[-1])
        return found

    def until(self, wanted: Any, key: str, limit: float = LIMIT) -> None:
        """Read on until an answer has this value under `key`."""
        deadline = time.monotonic() + limit
        while self.take(1, limit)[0].get(key) != wanted:
            if time.monotonic() > deadline:
                raise TooLate(f"no answer with {key}={wanted} in {limit:.0f} s")

    def catch_up(self) -> None:
        """Read all answers that came until now; from now on only requests that begin later count for `take`."""
        self._source.mark(word := f"mark-{next(_numbers)}")
        while not (line := self._source.line()).startswith(f"{word} "):
            self._add(line)
        self._since = int(line.rpartition(" ")[2])

    def stop(self) -> None:
        """Let the callers finish, and read all that they have written."""
        self._client.run("touch", self._flag)
        while not (line := self._source.line()).startswith(_END):
            self._add(line)

    def _add(self, line: str) -> bool:
        """Keep a line; whether it is a good answer to a request that began after the last `catch_up`."""
        began, _, answer = line.partition(" ")
        text, _, status = answer.rpartition(" ")
        if status == "200":
            self.good.append(json.loads(text))
            return int(began) > self._since
        if line:
            self.bad.append(line)
        return False
