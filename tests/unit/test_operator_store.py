"""The store: the newest version wins, whoever tells it; what is gone is gone; only differences are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from drumline_operator.store import Change, Store
from drumline_operator.trimmed import keep


def service(name: str = "a", version: int = 1, uid: str = "u", app: str = "a", **spec: Any) -> bytes:
    meta = {"name": name, "namespace": "n", "uid": uid, "resourceVersion": str(version), "managedFields": [{"x": 1}]}
    return json.dumps({"metadata": {**meta, "labels": {"drumline.dev/app": app}}, "spec": spec}).encode()


@pytest.fixture
def told() -> list[Change]:
    return []


@pytest.fixture
def store(told: list[Change]) -> Store:
    return Store(told.append)


def versions(store: Store) -> dict[str, int]:
    return {kept.name: kept.version for kept in store.all("Service")}


def test_what_is_kept(store: Store) -> None:
    store.seen("Service", service(port=1))
    found = store.get("Service", "n", "a")
    assert found == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "a",
            "namespace": "n",
            "uid": "u",
            "resourceVersion": "1",
            "labels": {"drumline.dev/app": "a"},
        },
        "spec": {"port": 1},
    }
    assert store.get("Service", "n", "b") is None
    assert store.of_app("Service", "n", "a") == [found]


def test_an_old_event_does_not_undo_a_write(store: Store, told: list[Change]) -> None:
    store.seen("Service", service(version=1, port=1))
    store.written("Service", service(version=5, port=5))
    assert len(told) == 1
    for late in (3, 5):
        store.seen("Service", service(version=late, port=late))
    assert versions(store) == {"a": 5}
    store.seen("Service", service(version=6, port=6))
    assert [change.any.version for change in told] == [1, 5, 6]


def test_what_others_wrote_just_before_a_write_of_our_own_is_told_once(store: Store, told: list[Change]) -> None:
    """Nobody has looked at it: the write was planned without it, and its answer hides it."""
    store.seen("Service", service(version=1))
    store.written("Service", service(version=5, port=5))
    store.written("Service", service(version=8, port=8))
    told.clear()
    for version in (3, 5, 8):
        store.seen("Service", service(version=version))
    assert [change.any.version for change in told] == [8], "the fifth and the eighth are our own"
    assert versions(store) == {"a": 8}


@pytest.mark.parametrize("listed", [3, 5])
def test_a_list_hides_what_others_wrote_before_it_so_the_object_is_looked_at(
    store: Store, told: list[Change], listed: int
) -> None:
    """Its watch goes on behind the list: nobody shows their third version any more."""
    store.seen("Service", service(version=1))
    store.written("Service", service(version=5, port=5))
    told.clear()
    store.replace("Service", None, [keep("Service", service(version=listed, port=listed))], version=8)
    assert [change.any.version for change in told] == [5]
    store.seen("Service", service(version=5, port=5))
    store.replace("Service", None, [keep("Service", service(version=5, port=5))], version=9)
    assert len(told) == 1
    assert store._unseen == {}


def test_a_look_does_not_speak_for_the_watch(store: Store, told: list[Change]) -> None:
    """It shows our own fifth version later, which is no news."""
    store.seen("Service", service(version=1))
    store.written("Service", service(version=5, port=5))
    store.seen("Service", service(version=6, port=6), looked=True)
    told.clear()
    store.seen("Service", service(version=5, port=5))
    store.seen("Service", service(version=6, port=6))
    assert told == []


def test_what_is_told_during_a_write_that_changes_nothing_is_told(store: Store, told: list[Change]) -> None:
    store.written("Service", service(version=5, port=5))
    with store.writing("Service", "n", "a"):
        store.seen("Service", service(version=3))
        store.written("Service", service(version=5, port=5))
    assert [change.any.version for change in told] == [5]


def test_what_does_not_count_is_not_told(store: Store, told: list[Change]) -> None:
    store.seen("Service", service(version=1, port=1))
    store.seen("Service", service(version=2, port=1))
    assert (versions(store), len(told)) == ({"a": 2}, 1)
    state = store.state("Service")
    store.seen("Service", service(version=3, port=2))
    assert store.state("Service") != state


def test_a_deletion_of_our_own_is_not_undone_by_events_that_were_on_their_way(store: Store, told: list[Change]) -> None:
    store.seen("Service", service(version=1))
    store.deleted("Service", "n", "a", "u")
    store.seen("Service", service(version=2))
    assert versions(store) == {}
    store.gone("Service", service(version=3))
    store.seen("Service", service(version=4, uid="v"))
    assert versions(store) == {"a": 4}
    assert [each.new is None for each in told] == [False, False]


def test_an_object_of_the_same_name_survives_its_predecessors_end(store: Store) -> None:
    store.written("Service", service(version=9, uid="new"))
    store.gone("Service", service(version=5, uid="old"))
    assert versions(store) == {"a": 9}


def test_a_list_tells_what_has_gone(store: Store, told: list[Change]) -> None:
    for name in "abc":
        store.seen("Service", service(name, version=1, app=name))
    store.written("Service", service("d", version=9, app="d"))
    told.clear()
    store.replace("Service", None, [keep("Service", service("a", version=7, app="a"))], version=8)
    assert versions(store) == {"a": 7, "d": 9}
    assert sorted(each.any.name for each in told) == ["b", "c"]
    assert store.of_app("Service", "n", "b") == []


def test_a_list_of_one_namespace_says_nothing_about_others(store: Store) -> None:
    store.seen("Service", service(version=1))
    store.replace("Service", "other", [], version=8)
    assert versions(store) == {"a": 1}
    store.forget("Service", "n")
    assert versions(store) == {}


def test_an_object_that_changes_its_app(store: Store) -> None:
    store.seen("Service", service(version=1, app="a"))
    store.seen("Service", service(version=2, app="b"))
    assert (store.of_app("Service", "n", "a"), len(store.of_app("Service", "n", "b"))) == ([], 1)


def test_of_config_maps_the_version_is_what_counts(store: Store, told: list[Change]) -> None:
    for version in (1, 2, 2):
        store.seen("ConfigMap", service(version=version))
    assert len(told) == 2


def test_kubectls_copy_is_not_kept() -> None:
    notes = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 1000, "mine": "y"}
    meta = {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "1", "annotations": notes}
    kept = keep("DistributedApp", json.dumps({"metadata": meta, "spec": {"image": "x"}}).encode())
    assert json.loads(kept.data)["metadata"]["annotations"] == {"mine": "y"}


def test_a_watch_that_is_quicker_than_the_answer_wakes_nobody(store: Store, told: list[Change]) -> None:
    with store.writing("Service", "n", "a"):
        store.seen("Service", service(version=5, port=5))
        assert versions(store) == {"a": 5}, "whoever looks sees it at once"
        store.seen("Service", service("b", version=6, uid="v"))
        store.written("Service", service(version=5, port=5))
    assert [change.any.name for change in told] == ["b"]
    store.seen("Service", service(version=7, port=7))
    assert len(told) == 2


@pytest.mark.parametrize("others", [(4,), (6,), (4, 5), (5, 6)])
def test_what_others_write_meanwhile_is_told_when_the_answer_is_there(
    store: Store, told: list[Change], others: tuple[int, ...]
) -> None:
    store.written("Service", service(version=1, port=1))
    with store.writing("Service", "n", "a"):
        for version in others:
            store.seen("Service", service(version=version, port=version))
        store.written("Service", service(version=5, port=5))
        assert told == []
    assert [change.new.version for change in told if change.new] == [each for each in others if each != 5]


def test_a_write_without_an_answer_hides_nothing(store: Store, told: list[Change]) -> None:
    with store.writing("Service", "n", "a"):
        store.seen("Service", service(version=5))
    assert len(told) == 1
    store.written("Service", service(version=6))
    with store.writing("Service", "n", "a"):
        store.gone("Service", service(version=7))
        store.written("Service", service(version=8, uid="v"))
    assert [change.new for change in told[1:]] == [None]
