"""The operator's settings from its environment."""

from __future__ import annotations

import re

import pytest

from drumline.errors import ConfigurationError
from drumline_operator.settings import ENV_PREFIX, OperatorSettings, ProcessSettings, from_env


def test_nothing_set() -> None:
    assert from_env({"PATH": "/bin", "DRUMLINE_PORT": "1"}) == (OperatorSettings(), ProcessSettings())


def test_both_parts() -> None:
    operator, process = from_env(
        {
            "DRUMLINE_OPERATOR_NAMESPACE": "ops",
            "DRUMLINE_OPERATOR_WORKER_IMAGE": "",
            "DRUMLINE_OPERATOR_WATCH_NAMESPACES": "a, b",
            "DRUMLINE_OPERATOR_LEADER_ELECTION": "false",
            "DRUMLINE_OPERATOR_BIND": "[::1]:0",
        }
    )
    assert (operator.namespace, operator.worker_image) == ("ops", "")
    assert (process.watch_namespaces, process.leader_election) == (("a", "b"), False)
    assert process.address == ("::1", 0)


@pytest.mark.parametrize(("bind", "address"), [(":8080", (None, 8080)), ("127.0.0.1:9", ("127.0.0.1", 9))])
def test_bind(bind: str, address: tuple[str | None, int]) -> None:
    assert ProcessSettings(bind=bind).address == address


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("WORKERS", "0", "DRUMLINE_OPERATOR_WORKERS: Input should be greater than or equal to 1"),
        ("WORKERS", "many", "DRUMLINE_OPERATOR_WORKERS: Input should be a valid integer"),
        ("BIND", "8080", "DRUMLINE_OPERATOR_BIND"),
        ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error', not 'loud'"),
        ("PORTS", "1", "DRUMLINE_OPERATOR_PORTS: no such setting; known are DRUMLINE_OPERATOR_BIND"),
        ("RENEW_DEADLINE", "15", "lease_duration must be more than renew_deadline"),
        ("LEASE_DURATION", "12.5", "whole seconds"),
    ],
)
def test_a_bad_value_is_named(name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        from_env({ENV_PREFIX + name: text})


def test_what_kubernetes_says_about_a_service_of_this_name_is_no_setting() -> None:
    links = {
        "SERVICE_HOST": "10.0.0.9",
        "SERVICE_PORT": "8080",
        "SERVICE_PORT_HTTP": "8080",
        "PORT": "tcp://10.0.0.9:8080",
        "PORT_8080_TCP": "tcp://10.0.0.9:8080",
        "PORT_8080_TCP_PROTO": "tcp",
    }
    assert from_env({ENV_PREFIX + name: text for name, text in links.items()})[1] == ProcessSettings()
