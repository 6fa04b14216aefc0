"""The generated pages of docs/reference: up to date, and no reason or field is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drumline.api.status import APP_CONDITIONS
from drumline.api.v1alpha1 import DistributedAppSpec, MachineTypeSpec
from drumline_operator import reasons
from drumline_operator.reference import PLACES, main, pages, places

ROOT = Path(__file__).parents[2]
REASONS = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}


def test_the_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0, "run `make reference`"


def test_a_stale_page_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--write", "--folder", str(tmp_path)]) == 0
    assert main(["--check", "--folder", str(tmp_path)]) == 0
    (tmp_path / "status.md").write_text("old")
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert "status.md" in capsys.readouterr().err


def test_every_reason_is_explained() -> None:
    assert set(reasons.MEANINGS) == REASONS
    assert set(reasons.CURES) <= REASONS
    text = pages()["status.md"]
    assert [each for each in REASONS if f"| `{each}` |" not in text] == []


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_a_reason_that_stops_an_app_says_what_to_do(reason: str) -> None:
    """All but those that only say that it takes time, or that somebody wanted it so."""
    bad = {place for place in places(reason) if place in {"Ready=False", "Failed=True", "MachineType Available=False"}}
    wanted = {reasons.SUSPENDED, reasons.STARTING, reasons.LOADING_MODEL, reasons.NEW_REVISION}
    assert (reason in reasons.CURES) == bool(bad and reason not in wanted)


def test_conditions_are_explained() -> None:
    text = pages()["status.md"]
    assert re.findall(r"^\| `(\w+)` \| .* \| .* \|$", text.partition("## Reasons")[0], re.MULTILINE) == list(
        APP_CONDITIONS
    )
    named = {place.split("=")[0] for each in PLACES.values() for place in each}
    assert named <= {*APP_CONDITIONS, "any condition", "MachineType Available"}


@pytest.mark.parametrize(
    ("page", "model"), [("distributedapp.md", DistributedAppSpec), ("machinetype.md", MachineTypeSpec)]
)
def test_every_field_is_there(page: str, model: type[DistributedAppSpec] | type[MachineTypeSpec]) -> None:
    text = pages()[page]
    for field in model.model_fields.values():
        assert field.description
        assert re.search(rf"^\| `{field.alias}` \| .*{re.escape(field.description)} \|$", text, re.MULTILINE), (
            field.alias
        )


def test_troubleshooting_has_a_section_for_each_reason() -> None:
    text = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text()
    sections = {name for heading in re.findall(r"^### (.+)$", text, re.MULTILINE) for name in heading.split(", ")}
    waits = {reasons.STARTING, reasons.LOADING_MODEL, reasons.NEW_REVISION, reasons.SUSPENDED, reasons.SCALED_TO_ZERO}
    assert sections == {*reasons.CURES, *waits}
