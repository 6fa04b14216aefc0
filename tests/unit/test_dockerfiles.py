"""What must hold for the images, as far as their Dockerfiles and lock files tell."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"worker": ["diffusion", "s3"], "operator": ["operator"]}
LOCKS = {"worker": ["cuda", "torch", "worker"], "operator": ["operator"]}

image = pytest.mark.parametrize("role", ["worker", "operator"])


def instructions(role: str) -> list[tuple[str, str]]:
    """Instruction and its arguments, comments and continued lines resolved."""
    lines = [line for line in (ROOT / f"Dockerfile.{role}").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def values(role: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(role) if word == instruction]


def pins(lock: Path) -> dict[str, set[str]]:
    """Hashes by `name==version`."""
    blocks = re.split(r"\n(?=\S)", lock.read_text().strip())
    found: dict[str, set[str]] = {}
    for block in blocks:
        name = block.split(";")[0].split("\\")[0].strip()
        found.setdefault(name, set()).update(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block))
    return found


def direct(extras: list[str]) -> set[str]:
    """Names of what an install with these extras asks for itself."""
    optional, todo, lines = (
        PROJECT["project"]["optional-dependencies"],
        [*extras],
        [*PROJECT["project"]["dependencies"]],
    )
    while todo:
        for line in optional[todo.pop()]:
            requirement = Requirement(line)
            if requirement.name == PROJECT["project"]["name"]:
                todo.extend(requirement.extras)
            else:
                lines.append(line)
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize("lock", sorted((ROOT / "images").glob("*.lock")), ids=lambda path: path.name)
def test_an_images_lock_is_a_part_of_the_whole_one(lock: Path) -> None:
    whole = pins(ROOT / "requirements.lock")
    for pin, hashes in pins(lock).items():
        assert hashes, f"{pin} has no hash"
        assert whole.get(pin) == hashes, f"{pin} is not what requirements.lock has: run `make lock`"
    assert "://" not in lock.read_text()
    assert "--index" not in lock.read_text()


@image
def test_an_image_has_all_that_is_asked_for(role: str) -> None:
    held = [pin.split("==")[0] for name in LOCKS[role] for pin in pins(ROOT / "images" / f"{name}.lock")]
    assert direct(EXTRAS[role]) - set(held) == set(), "run `make lock`"


def test_each_layer_of_the_worker_has_its_own_packages() -> None:
    held = [{pin.split("==")[0] for pin in pins(ROOT / "images" / f"{name}.lock")} for name in LOCKS["worker"]]
    assert sum(map(len, held)) == len(set.union(*held))
    assert "torch" in held[1]


def test_the_operator_has_no_torch() -> None:
    names = {pin.split("==")[0] for pin in pins(ROOT / "images" / "operator.lock")}
    assert not {name for name in names if name.startswith(("torch", "nvidia", "numpy", "diffusers"))}
    assert "kopf" in names


@image
def test_nothing_runs_as_root(role: str) -> None:
    assert instructions(role)[[word for word, _ in instructions(role)].index("USER") :]
    assert values(role, "USER") == ["10001:10001"]  # a number: the kubelet cannot tell whether a name is root


@image
def test_nothing_comes_from_a_host_that_we_name(role: str) -> None:
    assert values(role, "ADD") == []
    text = "\n".join(rest for word, rest in instructions(role) if word != "LABEL")
    assert "://" not in text
    stages = {line.split(" AS ")[1] for line in values(role, "FROM") if " AS " in line}
    assert {line.split(" AS ")[0] for line in values(role, "FROM")} - stages == {"python:3.13-slim-trixie"}


@image
def test_what_may_differ_between_builds_is_empty_unless_given(role: str) -> None:
    given = dict(line.partition("=")[::2] for line in values(role, "ARG"))
    assert given["PIP_INDEX_URL"] == given["UV_DEFAULT_INDEX"] == given["REVISION"] == ""
    assert given["VERSION"] == PROJECT["project"]["version"]


@image
def test_labels_say_what_it_is(role: str) -> None:
    (labels,) = values(role, "LABEL")
    found = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', labels))
    assert set(found) >= {"title", "description", "documentation", "licenses", "version", "revision", "base.name"}
    assert found["licenses"] == PROJECT["project"]["license"]
    assert found["documentation"] == PROJECT["project"]["urls"]["Documentation"]
    assert instructions(role)[-1][0] == "LABEL"  # so that a new revision changes no layer


@image
def test_the_code_comes_after_all_that_changes_less(role: str) -> None:
    own = [line for line in values(role, "COPY") if line.startswith("--from=code")]
    last = instructions(role).index(("COPY", own[-1]))
    assert [word for word, _ in instructions(role)[last + 1 :] if word in {"RUN", "COPY"}] == []


def test_the_worker_gets_torch_before_all_else() -> None:
    copied = re.findall(r"images/(\w+)\.lock", "\n".join(values("worker", "COPY")))
    assert copied == ["build", "uv", "cuda", "torch", "worker"]


@image
def test_every_pin_is_checked(role: str) -> None:
    for command in values(role, "RUN"):
        for install in re.findall(r"pip install(.*?)(?:&&|;|$)", command):
            checked = "--require-hashes" in install or "--offline" in install  # our own wheel
            assert checked or '--default-index "$TORCH_INDEX_URL"' in install, install


@image
def test_signals_reach_the_program(role: str) -> None:
    (entry,) = values(role, "ENTRYPOINT")
    assert entry.startswith("["), "the shell form has a shell in between"
    if role == "worker":
        assert entry == '["tini", "--"]'
        assert values(role, "CMD") == ['["drumline", "serve"]']


@image
def test_the_context_has_all_that_is_copied_and_little_else(role: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for line in values(role, "COPY"):
        if not line.startswith("--from"):
            for source in line.split()[:-1]:
                assert any(fnmatch.fnmatch(source, rule) for rule in allowed), f".dockerignore leaves {source} out"
