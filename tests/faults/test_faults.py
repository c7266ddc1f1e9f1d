"""The short form of `make test-faults`: one or a few of each fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cases import SETTINGS, SHORT, Bench


@pytest.fixture(scope="module")
def bench(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(text, tmp_path_factory.mktemp("faults"), seed=1)


@pytest.mark.parametrize("name", SHORT)
def test_after_a_fault_the_run_goes_on_and_loses_no_more_than_since_its_last_state(
    name: str, bench: Bench
) -> None:
    row = SHORT[name](bench)
    assert row.survived == row.tried, row
    assert row.steps_lost <= int(SETTINGS["save_every"]), row  # type: ignore[call-overload]
