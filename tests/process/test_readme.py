"""The README's and the guide's worker, manifest, commands and script do what the pages say."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide" / "getting-started.md").read_text()


def blocks(text: str, language: str | None = None) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if language in (None, name)]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The page's files: blocks whose first line is a comment with a name."""
    for block in blocks(request.param):
        if named := re.match(r"# (\w+\.\w+)\n", block):
            (tmp_path / named[1]).write_text(block)
    return tmp_path


@contextlib.contextmanager
def running(command: str, folder: Path) -> Iterator[str]:
    """Run ``drumline run ...`` on a free port; yield its URL when it says that it is ready."""
    name, *arguments = shlex.split(command)
    assert name == "drumline"
    process = subprocess.Popen(
        [sys.executable, "-m", "drumline", *arguments, "--port", "0", "--log-format", "json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout as output:
        try:
            seen = []
            for line in output:
                seen.append(line)
                record = json.loads(line) if line.startswith("{") else {"message": line}
                if record["message"].startswith("ready"):
                    yield record["url"]
                    break
            else:
                pytest.fail("".join(seen))
            process.terminate()
            rest = output.read()
            assert process.wait() == 0, rest
        finally:
            process.kill()


def curl(command: str, url: str) -> str:
    """Send what the ``curl`` command sends."""
    name, *arguments = shlex.split(command)
    assert name == "curl"
    address, data = (word for word in arguments if word not in {"-N", "-d"})
    assert address.startswith("localhost:8080")
    headers = {"content-type": "application/x-www-form-urlencoded"}  # what curl's -d says
    answer = httpx2.post(url + address.removeprefix("localhost:8080"), content=data, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.text


def matches(shown: str, real: str) -> bool:
    """Whether ``real`` is what the page shows; a line ``...`` stands for any number of lines."""
    pattern = re.escape(shown.strip()).replace(re.escape("\n...\n"), r"\n(?:.*\n)*?")
    return re.fullmatch(pattern, real.strip()) is not None


@pytest.mark.parametrize("folder", [README], indirect=True, ids=["README.md"])
def test_the_worker_of_the_readme(folder: Path) -> None:
    (commands,) = [block for block in blocks(README, "sh") if "curl" in block]
    start, *calls = commands.splitlines()
    (shown,) = [block for block in blocks(README, "") if "event:" in block]
    with running(start, folder) as url:
        real = "\n\n".join(curl(call, url).strip() for call in calls)
    assert matches(shown, real), real


@pytest.mark.parametrize("folder", [GUIDE], indirect=True, ids=["getting-started.md"])
def test_the_commands_of_the_guide(folder: Path) -> None:
    starts = re.findall(r"^drumline run .*$", GUIDE, re.MULTILINE)
    calls = re.findall(r"^curl .*$", GUIDE, re.MULTILINE)
    totals = {"-n 2": 12.0, "volume=0.5": 6.0, "app.yaml": 6.0}
    assert len(starts) == len(totals)
    assert calls
    for start, (part, total) in zip(starts, totals.items(), strict=True):
        assert part in start
        with running(start, folder) as url:
            assert json.loads(curl(calls[0], url)) == {"total": total}
            assert f'"total":{total}' in curl(calls[1], url)


@pytest.mark.parametrize("folder", [GUIDE], indirect=True, ids=["getting-started.md"])
def test_the_script_of_the_guide(folder: Path) -> None:
    (script,) = [block for block in blocks(GUIDE, "python") if "asyncio.run" in block]
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=True, timeout=50
    )
    lines = done.stdout.splitlines()
    assert lines[0] == lines[-1] == "{'total': 12.0}"
    assert lines[1:-1] == [f"{{'progress': {{'done': {n}, 'total': 4}}}}" for n in (1, 2, 3, 4)]
