"""Anything as a manifest: it is taken, or refused with a typed error; and what is taken means the same in a container."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from drumline.api.manifests import load_manifest, plain_env, to_settings
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError

DATA = Path(__file__).parents[1] / "data" / "manifests"
SPECS = [sample["app"] for sample in yaml.safe_load((DATA / "good.yaml").read_text()).values() if "app" in sample]
HEAD = "apiVersion: drumline.dev/v1alpha1\nkind: DistributedApp\nmetadata: {name: x}\n"
APP = HEAD + "spec: {image: a, workerClass: app:X, numGPUs: 0, %s}\n"
BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(9))

ODDITIES: dict[str, tuple[str, str]] = {
    "aliases of aliases": (BOMB, "more than 200000 values"),
    "aliases in setupArgs": (HEAD + "spec:\n  setupArgs:\n    " + BOMB.replace("\n", "\n    "), "more than 200000"),
    "alias of itself": (APP % "setupArgs: &a {b: *a}", "an alias of what it lies in"),
    "unknown alias": (APP % "setupArgs: *a", "undefined alias"),
    "python": (APP % "setupArgs: {a: !!python/object/apply:os.getpid []}", "constructor for the tag"),
    "set": (APP % "setupArgs: {a: !!set {b, c}}", "constructor for the tag"),
    "bytes": (APP % "setupArgs: {a: !!binary aGk=}", "constructor for the tag"),
    "date": (APP % "setupArgs: {a: !!timestamp 2024-01-01}", "constructor for the tag"),
    "no number": (APP % "worldSize: !!int ''", "'' is not a number"),
    "no truth": (APP % "setupArgs: {a: !!bool maybe}", "neither true nor false"),
    "NaN": (APP % "setupArgs: {a: .nan}", "JSON has no NaN"),
    "infinity": (APP % "worldSize: -.inf", "JSON has no NaN and no infinity"),
    "integer": (APP % f"setupArgs: {{a: {10**30}}}", "more than 64 bits"),
    "integer without end": (APP % f"worldSize: {'9' * 5000}", "is not a number"),
    "hexadecimal without end": (f"kind: 0x{'f' * 9000}", "more than 64 bits"),
    "half a character": (APP % 'setupArgs: {a: "\\ud800"}', "half of a surrogate pair"),
    "no character": (APP % 'setupArgs: {a: "\\UFFFFFFFF"}', "not YAML"),
    "zero byte": (APP % 'env: [{name: A, value: "a\\0b"}]', "spec.env[0].value: no variable can hold a zero byte"),
    "deep": (APP % f"setupArgs: {{a: {'[' * 100}{']' * 100}}}", "nested more than 60 levels"),
    "deeper": ("[" * 20_000, "nested too deeply"),
    "key twice": (APP % "image: b", "key 'image' twice"),
    "number as key": (APP % "setupArgs: {1: 2}", "spec.setupArgs"),
    "list as key": (APP % "setupArgs: {[1]: 2}", "not YAML"),
    "tabs": (HEAD + "spec:\n\timage: a\n", "cannot start any token"),
    "empty": ("", "none at all"),
    "only marks": ("---\n---\n", "none at all"),
    "two apps": (APP % "" + "---\n" + APP % "", "2 documents"),
    "many kinds": ("---\na: 1\n" * 50, "None, None, None"),
    "long kind": (f"kind: {'x' * 100_000}", "x..."),
    "long version": (f"kind: DistributedApp\napiVersion: {'x' * 100_000}", "... is not ours"),
    "too large": ("a: " + "x" * (3 << 20), "larger than 3 MiB"),
    "binary": ("\udcff\udcfe\0", "not a text file in UTF-8"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_oddities_are_refused_in_few_words(tmp_path: Path, oddity: str) -> None:
    text, words = ODDITIES[oddity]
    file = tmp_path / "app.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError) as refused:
        load_manifest(file)
    said = str(refused.value)
    assert said.startswith(f"{file}: ")
    assert words in said
    assert len(said) < 2000


@pytest.mark.parametrize(
    "text", ["\ufeff" + APP % "", (APP % "").replace("\n", "\r\n"), (APP % "").replace("\n", "\r")]
)
def test_marks_and_line_ends_of_other_systems(tmp_path: Path, text: str) -> None:
    file = tmp_path / "app.yaml"
    file.write_bytes(text.encode())
    assert load_manifest(file).metadata.name == "x"


def test_a_time_is_a_text_as_in_the_cluster(tmp_path: Path) -> None:
    file = tmp_path / "app.yaml"
    file.write_text(APP % "setupArgs: {at: 1:30:00, ports: 8080:80, n: 1_000, x: 0x10, f: 1e3, y: yes}")
    assert load_manifest(file).spec.setup_args == {
        "at": "1:30:00", "ports": "8080:80", "n": 1000, "x": 16, "f": "1e3", "y": True,
    }  # fmt: skip


ODD = st.sampled_from(
    ["", "x", "a:B", "a b", "\0", "é", "x" * 300, "-1", "1e3", "${A}", 0, -1, 1, 2**31, 2**53, 0.5, True, None, [], {}]
)
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    if isinstance(value, dict):
        found += [place for key, each in value.items() for place in places(each, (*at, key))]
    elif isinstance(value, list):
        found += [place for key, each in enumerate(value) for place in places(each, (*at, key))]
    return found


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    """A good one with up to three of its values changed, taken out, or with others beside them."""
    document = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "x"},
        "spec": copy.deepcopy(draw(st.sampled_from(SPECS))),
    }
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(document["spec"])))
        parent: Any = document
        path = ("spec", *place)
        for part in path[:-1]:
            parent = parent[part]
        match draw(st.sampled_from(["change", "remove", "add"])):
            case "remove" if len(path) > 1:
                del parent[path[-1]]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=9) | st.sampled_from(["env", "serving", "numGPUs", "worldSize"]))] = draw(
                    VALUES
                )
            case _:
                parent[path[-1]] = draw(VALUES)
    return document


def judged(file: Path, data: bytes) -> bool:
    """Whether it is taken; then its settings must be those that a container gets."""
    file.write_bytes(data)
    try:
        app = load_manifest(file)
        settings = to_settings(app)
    except ConfigurationError as refused:
        assert str(refused)
        return False
    assert RunnerSettings.from_env(settings.to_env()) == settings
    for name, value in plain_env(app).items():
        os.fsencode(name + value)
        assert "\0" not in name + value
    return True


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "app.yaml"


@given(document=manifests())
@examples(150)
def test_changed_manifests(file: Path, document: dict[str, Any]) -> None:
    judged(file, yaml.safe_dump(document).encode())


WORDS = st.sampled_from(
    [" ", "\n", ":", ": ", "- ", "&a ", "*a", "<<: ", "!!int ", "!!str ", "!x ", "{", "}", "[", "]", ",", "'", '"', "|", ">",
     "#", "---", "...", "%YAML 1.1\n", "\t", "\r", "\ufeff", "\0", "\\x", "? ", "@", "`", "~", ".nan", "0x", "1:1", "=", "kind"]
)  # fmt: skip


@given(
    document=manifests(),
    cuts=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 5), WORDS | st.text(max_size=3)), max_size=6),
    tail=st.binary(max_size=3),
)
@examples(150)
def test_broken_texts(file: Path, document: dict[str, Any], cuts: list[tuple[int, int, str]], tail: bytes) -> None:
    text = yaml.safe_dump(document)
    for at, length, put in cuts:
        text = text[: at % len(text)] + put + text[at % len(text) + length :] or " "
    judged(file, text.encode("utf-8", "surrogatepass") + tail)
