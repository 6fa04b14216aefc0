"""What `helm test` runs: wait until the app is ready, call it, check its answer. Standard library only."""

import json
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode, urlsplit

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
#: Service rules on a node follow the app's readiness with some delay.
ROUTE_SECONDS = 60
#: A connection that is begun before those rules may never get anywhere: its packets go where the first one went.
CONNECT_SECONDS = 3
RANKS, VALUE = 2, 20
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failed(Exception):
    """The test did not pass; the message says why."""


def api() -> tuple[urllib.request.OpenerDirector, str]:
    """Return an opener for the API server, and its URL."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    # Python 3.13 asks more of certificates than kubectl does.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    opener.addheaders = [("Authorization", f"Bearer {(ACCOUNT / 'token').read_text().strip()}")]
    return opener, f"https://{f'[{host}]' if ':' in host else host}:{port}"


def ready_url(namespace: str, name: str, seconds: float) -> str:
    """Watch the app until it is ready, and return its URL.

    Raises:
        Failed: it did not get ready in time; the message is its last condition.
    """
    deadline = time.monotonic() + seconds
    said = "nothing was said about it; is the operator running?"
    while (left := deadline - time.monotonic()) > 0:
        query = {"watch": "true", "fieldSelector": f"metadata.name={name}", "timeoutSeconds": max(1, int(left))}
        opener, server = api()
        path = f"/apis/drumline.dev/v1alpha1/namespaces/{namespace}/distributedapps?{urlencode(query)}"
        try:
            with opener.open(server + path, timeout=left + 5) as events:
                for line in events:
                    app = json.loads(line)["object"]
                    ready = condition(app, "Ready")
                    words = f"Ready={ready.get('status')} {ready.get('reason')}: {ready.get('message')}"
                    if ready and words != said:
                        said = words
                        print(words, flush=True)
                    current = ready.get("observedGeneration") == app["metadata"].get("generation")
                    if ready.get("status") == "True" and current:
                        return app["status"]["url"]
        except urllib.error.HTTPError as error:
            raise Failed(f"the API server: {error.code} {error.read().decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            print(f"watch again: {error}", flush=True)
            time.sleep(min(1, max(0, deadline - time.monotonic())))
    raise Failed(f"{namespace}/{name} is not ready after {seconds:.0f} s: {said}")


def condition(app: dict, type: str) -> dict:
    """Return a condition of the app, or an empty one."""
    return next((each for each in app.get("status", {}).get("conditions", ()) if each["type"] == type), {})


def call(url: str) -> dict:
    """Invoke the app.

    Raises:
        Failed: it answered with an error, or nobody answered.
    """
    body = json.dumps({"value": VALUE}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    address, deadline = urlsplit(url), time.monotonic() + ROUTE_SECONDS
    while True:
        try:
            socket.create_connection((address.hostname, address.port or 80), CONNECT_SECONDS).close()
            with DIRECT.open(request, timeout=ROUTE_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Failed(f"POST {url}: {error.code} {error.read().decode(errors='replace')}") from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise Failed(f"POST {url}: {error}") from None
            time.sleep(0.5)


def main() -> int:
    """Run the test; 0 when it passed."""
    namespace, name, seconds = os.environ["NAMESPACE"], os.environ["APP"], float(os.environ["TIMEOUT_SECONDS"])
    started = time.monotonic()
    expected = {"sum": RANKS * VALUE + sum(range(RANKS)), "ranks": RANKS}
    try:
        url = ready_url(namespace, name, seconds)
        answer = call(url)
        if answer != expected:
            raise Failed(f"POST {url}: {answer}, not {expected}")
    except Failed as error:
        print(f"failed: {error}", flush=True)
        return 1
    print(f"passed: {url} answered {answer} after {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
