"""Predictions that several processes make together: those that one makes, and never a process that waits for ever."""

from __future__ import annotations

import pytest

import stg_hooks as stg
from tests import rank_checks, ranks, zoo

pytestmark = pytest.mark.xdist_group("ranks")
SPREAD = ("ddp", "fsdp2", "tensor_parallel", "context_parallel", "branches_of_pipelines")
"""The checks in tests/spread_checks.py, which needs diffusers."""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run("tests.rank_checks", list(rank_checks.CHECKS), 3, tmp_path_factory.mktemp("ranks"), limit=240)


@pytest.mark.slow
@pytest.mark.parametrize("check", rank_checks.CHECKS)
def test_ranks(check: str, wrong: dict[str, str]) -> None:
    said = wrong.get(check, "")
    if check == "a_rank_that_dies":
        head, _, tail = said.partition("rank 2: did not end")
        assert tail  # it has died
        said = head.strip()
    assert not said, said


@pytest.fixture(scope="module")
def wrong_with_spread_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run("tests.spread_checks", SPREAD, 2, tmp_path_factory.mktemp("spread"), limit=270)


@pytest.mark.slow
@pytest.mark.parametrize("check", SPREAD)
def test_spread(check: str, wrong_with_spread_models: dict[str, str]) -> None:
    assert check not in wrong_with_spread_models, wrong_with_spread_models[check]


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(stg.TargetError, match="torchrun"):
        stg.apply(zoo.build("plain"), [2], group="all")  # type: ignore[arg-type]
