"""What holds for every layer: a time-out per test, no silent skips in CI, platform and GPU markers."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

#: Seconds one test may take, by the folder it lies in; `@pytest.mark.timeout` on a test wins. These are limits for a
#: busy machine with two cores: a test that comes near one is broken, or in the wrong layer.
TIMEOUTS = {
    "unit": 30,
    "cluster": 60,
    "property": 60,
    "handlers": 120,
    "chart": 60,
    "contract": 60,
    "process": 120,
    "strategies": 600,  # CI runs them beside the scenarios, with less priority
    "gpu": 300,
}

TESTS = Path(__file__).parent

# A slow machine is not a bug of the code under test, so hypothesis measures no time: the limits above do.
settings.register_profile("drumline", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("drumline")

# A shell ignores SIGINT in what it runs in the background, and so would the programs that are tested with Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_skipped: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its layer's time-out, and leave out what is for another platform."""
    elsewhere = {"linux": sys.platform != "linux", "macos": sys.platform != "darwin", "ipv6": not has_ipv6_loopback()}
    kept, left_out = [], []
    for item in items:
        layer = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if layer in TIMEOUTS and item.get_closest_marker("timeout") is None:
            # A hypothesis test is a hundred tests, wherever it lies.
            many = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            item.add_marker(pytest.mark.timeout(TIMEOUTS["property"] if many and layer == "unit" else TIMEOUTS[layer]))
        if layer == "gpu":
            item.add_marker("gpu")
        wrong = any(wrong and item.get_closest_marker(name) for name, wrong in elsewhere.items())
        (left_out if wrong else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def has_ipv6_loopback() -> bool:
    """Whether ``::1`` can be bound; containers often have no such address."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU; nobody but them loads torch for that."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember skips: in CI a test that did not run counts as one that failed."""
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """The same for whole modules."""
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a CI run that skipped something."""
    if os.environ.get("CI") and _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say so."""
    if os.environ.get("CI") and _skipped:
        terminalreporter.section("skipped in CI, which counts as failed", red=True)
        for nodeid in _skipped:
            terminalreporter.line(nodeid)
