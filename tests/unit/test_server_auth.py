import pytest

from drumline.problems import ProblemError
from drumline.server import limits
from drumline.server.auth import ApiKeys

KEYS = ApiKeys(["first-key", "second-key", "schlüssel"])


def test_without_keys_everybody_is_their_address() -> None:
    assert ApiKeys(()).caller({}, "10.0.0.7") == "10.0.0.7"


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        ({b"authorization": b"Key first-key"}, "key-0"),
        ({b"authorization": b"Bearer second-key"}, "key-1"),
        ({b"authorization": b"bearer   second-key "}, "key-1"),
        ({b"x-api-key": b"first-key"}, "key-0"),
        ({b"x-api-key": "schlüssel".encode()}, "key-2"),
        ({b"authorization": b"Basic Zm9v", b"x-api-key": b"second-key"}, "key-1"),
    ],
)
def test_keys(headers: dict[bytes, bytes], caller: str) -> None:
    assert KEYS.caller(headers, "10.0.0.7") == caller


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"Key"},
        {b"authorization": b"Key first-ke"},
        {b"authorization": b"Key first-keyy"},
        {b"authorization": b"first-key"},
        {b"authorization": b"Basic first-key"},
        {b"x-api-key": b""},
        {b"x-api-key": b"\xff\xfe"},
    ],
)
def test_refused(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(ProblemError) as caught:
        KEYS.caller(headers, "10.0.0.7")
    problem = caught.value.problem
    assert problem.status == 401
    assert [value for name, value in problem.headers() if name == "www-authenticate"] == [
        'Key realm="drumline"',
        'Bearer realm="drumline"',
    ]


def test_request_ids() -> None:
    assert limits.request_id(b"abc-DEF_1.2") == "abc-DEF_1.2"
    assert limits.request_id(None, b"from-fal") == "from-fal"
    assert limits.request_id(b"bad id", b"good") == "good"
    for bad in (b"", b"a b", b"a" * 129, b"a\n", b"\xe4", b"a;b", None):
        made = limits.request_id(bad)
        assert len(made) == 32
        assert made != limits.request_id(bad)
