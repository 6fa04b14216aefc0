"""Log lines: what people see on a terminal, what programs read from a container."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings

import pytest

from drumline import logs


@pytest.fixture
def bare_logging():
    """Call it for logging as a fresh program has it (without pytest's handlers); afterwards everything is as before."""
    loggers = [logging.getLogger(name) for name in ("", "drumline", "uvicorn", "uvicorn.access", "uvicorn.error")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]

    def clear():
        for logger in loggers:
            logger.handlers[:] = []

    yield clear
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)


def record(message="hello", level=logging.INFO, name="drumline.test", **extra):
    made = logging.LogRecord(name, level, __file__, 1, message, (), None)
    vars(made).update(extra)
    return made


def people(**kwargs):
    return logs.PeopleFormatter(colour=False).format(record(**kwargs))


def test_people_see_time_and_message_only():
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}  hello", people())


def test_people_see_level_rank_and_short_request_id():
    line = people(level=logging.WARNING, rank=1, request_id="0123456789abcdef")
    assert line.split(" ", 1)[1] == "warning rank 1 01234567  hello"


def test_output_before_there_are_ranks():
    assert people(rank=-1).split(" ", 1)[1] == "import  hello"


def test_each_line_of_a_rank_has_its_head():
    lines = people(message="a\nb", rank=3).split("\n")
    assert [line.split(" ", 1)[1] for line in lines] == ["rank 3  a", "rank 3  b"]


def test_people_see_how_long_a_request_took():
    times = {"queue_wait": 0.0, "run_time": 1.25025, "duration": 1.3}
    line = people(name="drumline.access", message="POST / 200", request_id="0123456789", **times)
    assert line.endswith("01234567  POST / 200 (waited 0.0 ms, ran 1250.2 ms)")


def test_an_access_line_of_a_request_that_reached_no_rank():
    line = people(name="drumline.access", message="GET / 200", queue_wait=None, run_time=None, duration=0.002)
    assert line.endswith("  GET / 200 (took 2.0 ms)")


def test_control_sequences_do_not_reach_the_terminal():
    line = people(message="\x1b[2J\x1b]0;title\x07up\x1b[A\rhid\x08den \x1b[31mred\x1b[0m\x1bc\x1f")
    assert line.endswith("  uphidden redc")


def test_colours_of_a_rank_stay_in_its_line():
    line = logs.PeopleFormatter(colour=True).format(record("\x1b[31mred"))
    assert line.endswith("\x1b[31mred\x1b[0m")


def test_people_see_the_traceback():
    try:
        raise ValueError("bad")
    except ValueError:
        line = people(exc_info=sys.exc_info())
    assert "Traceback" in line
    assert line.endswith("ValueError: bad")


def as_json(**kwargs):
    return json.loads(logs.JsonFormatter().format(record(**kwargs)))


def test_json_has_the_documented_fields():
    line = as_json(
        message="hello", level=logging.ERROR, rank=0, request_id="r1", queue_wait=0.5, run_time=None, created=0.25
    )
    assert line == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "error",
        "logger": "drumline.test",
        "message": "hello",
        "rank": 0,
        "request_id": "r1",
        "queue_wait": 0.5,
    }


def test_json_has_the_fields_of_an_access_line_as_members():
    line = as_json(
        name="drumline.access", fields={"status": 200, "run_ms": None, "request_id": "r1", "level": "forged"}
    )
    assert (line["status"], line["request_id"], line["level"]) == (200, "r1", "info")
    assert not {"run_ms", "fields"} & set(line)


def test_json_names_the_ranks_logger():
    assert as_json(name="drumline.rank", rank_logger="diffusers")["logger"] == "diffusers"


def test_json_has_the_exception():
    try:
        raise ValueError("bad")
    except ValueError:
        line = as_json(exc_info=sys.exc_info())
    assert line["exception"].endswith("ValueError: bad")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: object()}, b"\xff", "\ud800", {(1,): 2}])
def test_json_is_one_strict_line_whatever_the_fields_hold(value):
    text = logs.JsonFormatter().format(record("a\nb", field=value))
    assert "\n" not in text
    assert "field" in json.loads(text, parse_constant=pytest.fail)


def test_an_extra_field_cannot_replace_ours():
    assert as_json(message="hello", level=logging.INFO, time="forged")["time"] != "forged"


def test_configured_json_goes_to_stdout(bare_logging, capsys):
    bare_logging()
    logs.configure("json", "info")
    logging.getLogger("drumline.x").info("shown")
    logging.getLogger("drumline.x").debug("hidden")
    out, err = capsys.readouterr()
    assert [json.loads(line)["message"] for line in out.splitlines()] == ["shown"]
    assert err == ""


def test_configured_text_goes_to_stderr(bare_logging, capsys):
    bare_logging()
    logs.configure("text", "debug")
    logging.getLogger("drumline.x").debug("shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("debug  shown\n")


def test_auto_is_json_without_a_terminal(bare_logging, capsys):
    bare_logging()
    logs.configure("auto")
    logging.getLogger("x").warning("shown")
    assert json.loads(capsys.readouterr().out)["message"] == "shown"


def test_configuring_twice_prints_once(bare_logging, capsys):
    bare_logging()
    logs.configure("text")
    logs.configure("text")
    logging.getLogger("x").warning("shown")
    assert capsys.readouterr().err.count("shown") == 1


def test_uvicorn_and_warnings_come_the_same_way(bare_logging, capsys):
    bare_logging()
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(io.StringIO()))
    logs.configure("json")
    logging.getLogger("uvicorn.error").info("started", extra={"color_message": "started"})
    logging.getLogger("uvicorn.access").info("GET / 200")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["logger"] for line in lines] == ["uvicorn.error", "py.warnings"]
    assert "color_message" not in lines[0]
    assert "old way" in lines[1]["message"]


def test_chatty_libraries_are_quiet(bare_logging, capsys):
    bare_logging()
    logs.configure("text", "debug")
    logging.getLogger("httpx2").info("HTTP Request: ...")
    logging.getLogger("httpcore2.connection").debug("connect_tcp")
    assert capsys.readouterr().err == ""


def test_a_program_without_logging_sees_its_ranks(bare_logging, capsys):
    bare_logging()
    logs.ensure_handler()
    logs.ensure_handler()
    logging.getLogger("drumline.rank").info("step 1", extra={"rank": 1, "request_id": ""})
    assert capsys.readouterr().err.endswith("rank 1  step 1\n")


def test_the_stand_in_leaves_when_the_program_sets_up_logging(bare_logging, capsys):
    bare_logging()
    logs.ensure_handler()
    seen = io.StringIO()
    logging.basicConfig(stream=seen, level=logging.WARNING, format="%(message)s")
    logging.getLogger("drumline.rank").warning("once")
    logging.getLogger("drumline.rank").info("below the program's level")
    assert capsys.readouterr().err == ""
    assert seen.getvalue() == "once\n"
    assert logging.getLogger("drumline").level == logging.NOTSET


def test_a_program_with_logging_gets_no_second_handler(bare_logging):
    bare_logging()
    logging.getLogger("drumline").addHandler(logging.NullHandler())
    logs.ensure_handler()
    assert len(logging.getLogger("drumline").handlers) == 1


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_only_on_a_terminal_that_wants_it(environ, coloured):
    ours, theirs = pty.openpty()
    script = "from drumline import logs; import logging; logs.configure(); logging.warning('hot')"
    clean = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "TERM"}}
    try:
        subprocess.run([sys.executable, "-c", script], stderr=theirs, check=True, timeout=60, env=clean | environ)
        seen = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (b"\x1b[33mwarning" in seen) is coloured
    assert b"hot" in seen


def test_a_reader_that_went_away_stops_nothing():
    script = "from drumline import logs; import logging; logs.configure('json')\n"
    script += "for _ in range(64): logging.warning('x' * 4096)\nopen(2, 'w').write('done')"
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(theirs)
    assert done.stderr.startswith(b"done")
