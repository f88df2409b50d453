"""Settings as JSON: what `to_dict` returns asks for the same, in another process, too."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import stg_hooks as stg
from tests import zoo


def fading(step: stg.Step) -> float:
    return 1.0 - (step.fraction or 0.0)


SETTINGS: dict[str, dict[str, Any]] = {
    "layers": {"layers": [1, -1], "scale": 0.5},
    "a range": {"layers": range(1, 3), "scale": 2},
    "names": {"layers": "blocks.2", "mode": "values", "rescale": 0.7},
    "a regular expression": {"layers": [re.compile(r"BLOCKS\.[12]$", re.I), re.compile("blocks.0")]},
    "a mode per layer": {"layers": {1: "values", "blocks.2": "residual", re.compile("blocks.0"): "dropout(p=0.1)"}},
    "values of a rule": {"layers": [1], "rule": "apg(eta=0.5, norm=15.0)"},
    "a scale of a name": {"layers": [1], "scale": stg.rules.adaptive_scale(2.0, 0.001), "rule": "apg(norm_dim=(-1,))"},
    "a schedule of a name": {"layers": [1], "schedule": stg.rules.zero_init(2), "rule": "zero_star"},
    "a window": {"layers": [1], "start": 0.1, "stop": 0.8},
    "noise levels": {"layers": [1], "sigma_range": (0.3, 0.9)},
    "branches": {"branches": [stg.Branch([1], 1.5, "attention"), stg.Branch("blocks.2", 0.5)]},
    "a list by noise level": {"layers": [1], "schedule": [(0.5, {"scale": 2.0}), (0.0, {"scale": 0.5})]},
    "branches by noise level": {"layers": [1], "schedule": [(0.5, {"branches": [stg.Branch([2])]}), (0.0, {})]},
    "functions of a module": {"layers": [1], "scale": fading, "rule": stg.rules.zero_star},
    "every": {"layers": [1], "every": 2, "rule": "apg", "strict": True},
    "on uncond": {"layers": [1], "on": "uncond"},
}


def skipped(model: nn.Module, branch: stg.Branch) -> tuple[Any, ...]:
    return stg.check(model, branch.layers, branch.mode), str(branch.mode), branch.kind


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("face", ["apply", "Guider"])
def test_settings_survive_json(name: str, face: str) -> None:
    model, given = zoo.build("plain"), SETTINGS[name]

    def made(settings: dict[str, Any]) -> Any:
        if face == "Guider":
            return stg.Guider(model, **{"guidance_scale": 3.0, **settings})
        applied = stg.apply(model, batched_cfg=True, guidance_scale=3.0, **settings)
        applied.not_to_be_entered()
        return applied

    first = made(given)
    plain = json.loads(json.dumps(first.to_dict()))
    assert set(plain) - {"guidance_scale"} == set(given)
    again = made(plain)
    assert again.to_dict() == first.to_dict()
    for index in range(4):
        step = stg.Step(index, 4, 0.9 - 0.25 * index, timestep=900.0 - 250 * index)
        one, other = first.plan.at(step), again.plan.at(step)
        assert [skipped(model, branch) for branch in one.active] == [skipped(model, branch) for branch in other.active]
        assert [branch.scale for branch in one.active] == [branch.scale for branch in other.active]
        assert (one.rescale, one.rule) == (other.rescale, other.rule)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("scale", {"layers": [1], "scale": lambda step: 1.0}),
        ("scale", {"layers": [1], "scale": torch.tensor([1.0])}),
        ("layers", {"layers": nn.Linear(1, 1)}),
        ("rule", {"layers": [1], "rule": stg.rules.AveragedApg()}),
        ("layers", {"layers": {1: lambda call: call.compute()}}),
    ],
)
def test_what_json_cannot_hold_is_named(name: str, given: dict[str, Any]) -> None:
    model = zoo.build("plain")
    if name == "layers":
        given = {"layers": model.blocks[1]}
    guider = stg.Guider(model, guidance_scale=3.0, **given)
    with pytest.raises(stg.SettingError, match=rf"^{name}=.* cannot be saved as JSON"):
        guider.to_dict()


def test_a_rule_with_its_values_set_travels() -> None:
    given = functools.partial(stg.rules.magnitude_aware, alpha=4.0)
    applied = stg.apply(zoo.build("plain"), [1], rule=given, batched_cfg=True, guidance_scale=3.0)
    applied.not_to_be_entered()
    assert applied.to_dict() == {"layers": [1], "rule": "magnitude_aware(alpha=4.0)"}


def test_a_published_setting_travels_by_its_name() -> None:
    applied = stg.apply(zoo.build("plain"), layers=[1])
    applied.not_to_be_entered()
    assert applied.to_dict() == {"layers": [1]}


def test_a_function_of_a_module_that_is_not_there() -> None:
    with pytest.raises(stg.SettingError, match="import nowhere first"):
        stg.apply(zoo.build("plain"), layers=[1], scale="nowhere:fading")  # type: ignore[arg-type]
