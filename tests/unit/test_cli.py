"""The command line: exit codes, one clear line per error, nothing heavy before it is needed."""

import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from drumline.cli import app

WIDE = {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"}


def drumline(*arguments, env=None):
    return CliRunner().invoke(app, list(arguments), env={**WIDE, **(env or {})})


def test_help_names_the_commands():
    result = drumline("--help")
    assert result.exit_code == 0
    for command in ("run", "serve", "invoke", "stream", "doctor"):
        assert command in result.output


@pytest.mark.parametrize("command", ["run", "serve", "invoke", "stream", "doctor"])
def test_each_command_has_help(command):
    result = drumline(command, "-h")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    result = drumline("--version")
    assert result.exit_code == 0
    assert result.output.startswith("drumline 0.")


@pytest.mark.parametrize(
    "arguments", [[], ["nope"], ["run"], ["run", "x.py", "--nope"], ["run", "x.py", "-n", "0"], ["doctor", "-o", "xml"]]
)
def test_wrong_use_is_2(arguments):
    assert drumline(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.py"], "nowhere.py: no such file"),
        (["run", "no-such-thing"], "write path.py"),
        (["invoke", "sdxl", "prompt=x"], "no kubeconfig: /nowhere does not exist"),
        (["invoke", "default/sdxl", "-n", "art"], "is in namespace default, --namespace says art"),
        (["stream", "localhost:8080", "--context", "kind"], "--context are for names of apps"),
        (["invoke", "app.py"], "start it with `drumline run app.py`"),
        (["stream", "ftp://x"], "not an address of a web server"),
        (["invoke", "localhost:1", "prompt"], "neither JSON nor KEY=VALUE"),
        (["invoke", "https://localhost:1", "--cacert", "none.pem"], "not a PEM file"),
    ],
)
def test_a_wrong_target_or_value_is_2_and_says_what_to_try(arguments, said, tmp_path):
    (tmp_path / "kubectl").touch(0o755)
    env = {"KUBECONFIG": "/nowhere", "PATH": str(tmp_path), "KUBERNETES_SERVICE_HOST": ""}
    result = drumline(*arguments, env=env)
    assert result.exit_code == 2, result.output
    error, hint, *rest = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("try:   ")
    assert rest == []
    assert result.stdout == ""


def test_nobody_there_is_1():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for command in ("invoke", "stream"):
        result = drumline(command, f"localhost:{port}")
        assert result.exit_code == 1
        assert "error: cannot reach" in result.stderr
        assert "try:   drumline run TARGET" in result.stderr
        assert "Traceback" not in result.output


def test_debug_shows_the_traceback():
    result = drumline("invoke", "localhost:1", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: cannot reach" in result.stderr


def test_a_syntax_error_in_the_target_names_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("import os\ndef broken(\n")
    result = drumline("run", str(tmp_path / "broken.py"), "--port", "0")
    assert result.exit_code == 2
    assert "broken.py:2" in result.stderr


def test_a_bad_environment_of_serve_is_2_and_named(tmp_path):
    log = tmp_path / "termination-log"
    log.touch()
    env = {"DRUMLINE_PORT": "many", "DRUMLINE_TERMINATION_LOG": str(log)}
    result = drumline("serve", env=env)
    assert result.exit_code == 2
    assert "DRUMLINE_PORT: 'many' is not JSON" in result.stderr
    assert log.read_text().startswith("ConfigurationError: DRUMLINE_PORT")


def test_serve_needs_a_target():
    result = drumline("serve")
    assert result.exit_code == 2
    assert "DRUMLINE_TARGET" in result.stderr


def test_run_tells_of_settings_that_do_not_exist():
    result = drumline("run", "nowhere.py", env={"DRUMLINE_PROT": "8080"})
    assert "no such setting: DRUMLINE_PROT" in result.stderr


def test_completion():
    # Typer finds the shell by looking at the parent processes, which under make are sh.
    script = "from drumline.cli import app; app(prog_name='drumline')"
    shown = subprocess.run(
        [sys.executable, "-c", script, "--show-completion", "bash"],
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "_DRUMLINE_COMPLETE=complete_bash" in shown.stdout
    complete = {"_DRUMLINE_COMPLETE": "complete_bash", "COMP_WORDS": "drumline do", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | complete,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["doctor"]


HEAVY = ("torch", "fastapi", "starlette", "uvicorn", "httpx2", "numpy", "PIL")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["invoke", "--help"]])
def test_help_is_quick(arguments):
    script = f"""
import sys
from drumline.cli import app
try:
    app({arguments!r})
finally:
    print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
