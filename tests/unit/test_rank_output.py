"""Output of ranks: whatever bytes they write become bounded lines with a level."""

import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.rank_output import LONGEST_LINE, LineSplitter, log_rank_line, parse_rank_line


def split(*chunks: bytes) -> list[bytes]:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return lines + splitter.flush()


def test_plain_lines():
    assert split(b"one\ntw", b"o\nthree") == [b"one", b"two", b"three"]
    assert parse_rank_line(b"hello") == (logging.INFO, "", "hello")


def test_empty_lines_stay_and_line_ends_of_windows_go():
    assert split(b"a\r\n\r\nb\n") == [b"a", b"", b"b"]


def test_bytes_that_are_not_utf8_are_replaced():
    assert parse_rank_line(b"caf\xe9 \xff")[2] == "caf� �"


def test_a_progress_bar_is_its_last_state():
    bar = [b"\r %d%%" % percent for percent in range(101)]
    assert split(*bar, b"\n", b"next\n") == [b" 100%", b"next"]
    assert split(*bar) == [b" 100%"]
    assert split(b"10%\r20%\r30%\r") == [b"30%"]


def test_a_progress_bar_that_ends_in_blanks_keeps_its_last_visible_state():
    assert parse_rank_line(b"\r 90%\r 100%\r      \r")[2] == " 100%"


def test_a_progress_bar_takes_no_memory():
    splitter = LineSplitter()
    for step in range(5000):
        assert splitter.feed(b"\r" + b"#" * 100 + str(step).encode()) == []
        assert len(splitter._rest) < 300
    assert splitter.flush() == [b"#" * 100 + b"4999"]


def test_very_long_lines_are_split_between_characters():
    text = "ä" * 100_000
    parts = split(text.encode() + b"\n")
    assert max(map(len, parts)) <= LONGEST_LINE
    assert "".join(part.decode() for part in parts) == text


def test_an_endless_line_is_split_before_it_ends():
    splitter = LineSplitter()
    assert [len(part) for part in splitter.feed(b"x" * (LONGEST_LINE * 2 + 5))] == [LONGEST_LINE, LONGEST_LINE]
    assert splitter.flush() == [b"x" * 5]


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 7))
@settings(max_examples=200)
def test_chunk_borders_change_nothing(chunks, size):
    data = b"".join(chunks)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert [line for line in split(*pieces) if line.strip()] == [line for line in split(data) if line.strip()]


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_can_be_parsed(line):
    level, name, text = parse_rank_line(line)
    assert isinstance(level, int)
    assert isinstance(name, str)
    text.encode()


@pytest.mark.parametrize(
    "line", [b"\x1e", b"\x1e{}\tx", b"\x1e[1]\tx", b'\x1e{"level":"x","logger":1}\tx', b"\x1eno\tx"]
)
def test_a_forged_mark_is_plain_output(line):
    assert parse_rank_line(line)[:2] == (logging.INFO, "")


def from_a_rank(script: str) -> list[bytes]:
    setup = "import logging, sys; from drumline.logs import rank_handler\n"
    setup += "logging.basicConfig(handlers=[rank_handler()], level=10)\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + script], capture_output=True, check=True, timeout=60, env=os.environ
    )
    return split(done.stderr)


def test_a_ranks_own_records_keep_level_logger_and_lines():
    lines = from_a_rank("logging.getLogger('diffusers').warning('two\\nlines')\nlogging.getLogger('a').debug('x')")
    assert [parse_rank_line(line) for line in lines] == [
        (logging.WARNING, "diffusers", "two\nlines"),
        (logging.DEBUG, "a", "x"),
    ]


def test_a_ranks_exception_is_one_record():
    (line,) = from_a_rank("try: 1/0\nexcept ZeroDivisionError: logging.exception('oh')")
    level, _, text = parse_rank_line(line)
    assert level == logging.ERROR
    assert text.startswith("oh\nTraceback")
    assert text.endswith("ZeroDivisionError: division by zero")


def test_a_record_in_the_middle_of_a_progress_bar_is_found():
    lines = from_a_rank("sys.stderr.write('\\r 10%')\nlogging.warning('hot')\nsys.stderr.write('\\r 20%\\n')")
    assert [parse_rank_line(line)[::2] for line in lines] == [(20, " 10%"), (30, "hot"), (20, " 20%")]


def test_a_very_long_record_keeps_its_level_in_every_part():
    lines = from_a_rank("logging.error('ö' * 100_000)")
    assert len(lines) > 1
    assert max(map(len, lines)) <= LONGEST_LINE
    parsed = [parse_rank_line(line) for line in lines]
    assert {level for level, _, _ in parsed} == {logging.ERROR}
    assert "".join(text for _, _, text in parsed) == "ö" * 100_000


def test_a_ranks_line_becomes_a_record_with_rank_and_request(caplog):
    with caplog.at_level(logging.INFO, "drumline.rank"):
        log_rank_line(b'\x1e{"level":30,"logger":"diffusers"}\t100% sure', rank=1, request_id="r7")
        log_rank_line(b'\x1e{"level":10,"logger":"diffusers"}\tquiet', rank=1)
        log_rank_line(b"plain", rank=0)
        log_rank_line(b" \t", rank=0)
    first, second = caplog.records
    assert (first.rank, first.request_id, first.rank_logger, first.levelno) == (1, "r7", "diffusers", logging.WARNING)
    assert first.getMessage() == "100% sure"
    assert (second.rank, second.getMessage(), second.name) == (0, "plain", "drumline.rank")
