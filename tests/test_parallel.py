"""Predictions that several processes make together: those that one makes, and never a process that waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

import stg_hooks as stg
from tests import rank_checks, ranks, zoo

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return ranks.run("tests.rank_checks", 3, folder, limit=120)


@pytest.mark.parametrize("check", rank_checks.CHECKS)
def test_ranks(check: str, wrong: dict[str, str]) -> None:
    said = wrong.get(check, "")
    if check == "a_rank_that_dies":
        head, _, tail = said.partition("rank 2: did not end")
        assert tail  # it has died
        said = head.strip()
    assert not said, said


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(stg.TargetError, match="torchrun"):
        stg.apply(zoo.build("plain"), [2], group="all")  # type: ignore[arg-type]
