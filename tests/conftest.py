"""Every test starts from the same random numbers and leaves nothing installed behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from stg_hooks.hooks import activation
from stg_hooks.hooks import forward as patching


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    """The plain model of the zoo."""
    from tests import zoo

    return zoo.build("plain")


@pytest.fixture
def inference() -> Iterator[None]:
    """Keep no gradients; a file of tests asks for it with `pytestmark`."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _nothing_left_in_force() -> Iterator[None]:
    """No test may end with a session still in force, or a module still replaced: the next one would be perturbed."""
    yield
    assert activation._ACTIVE.get() == ()
    assert not patching._SHARED
