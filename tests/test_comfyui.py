"""The nodes for ComfyUI on small stand-ins of its extension points; test_comfyui_real.py has the real one."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.guidance.request import Request
from stg_hooks.integrations.comfyui import __main__ as entry
from stg_hooks.integrations.comfyui import fields, nodes
from stg_hooks.integrations.comfyui.guidance import SkipGuidance
from tests import comfy_stand_in, zoo
from tests.comfy_stand_in import Guider, Model, Patcher, comfy, prompt

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = "integrations/comfyui/example_workflows/stg_ltx_video.json"
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
exact: dict[str, Any] = {"rtol": 0, "atol": 0}
pytestmark = [pytest.mark.usefixtures("comfy"), pytest.mark.filterwarnings("error::stg_hooks.StgWarning")]
__all__ = ["comfy"]


class Denoiser(zoo.DiT):
    """Looks at the options of a call, as patches of ComfyUI do: which rows are of which conditioning."""

    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:  # type: ignore[override]
        size = len(x) // len(options["cond_or_uncond"])
        assert size * len(options["uuids"]) == len(x)
        shift = torch.tensor([0.1 * which for which in options["cond_or_uncond"] for _ in range(size)])
        return super().forward(x + shift[:, None, None], text)


@pytest.fixture
def patcher() -> Patcher:
    torch.manual_seed(0)
    return Patcher(Model(Denoiser().eval().requires_grad_(False)))


X = zoo.inputs(2)["x"]


def guide(patcher: Patcher, layers: str = "2", mode: str = "residual", **given: Any) -> Patcher:
    found, _ = nodes.STGGuidanceAdvanced().guide(patcher, layers, mode, **given)
    assert isinstance(found, Patcher)
    return found


def predicted(patcher: Patcher, cond: Any, sigma: float = 1.0, layers: tuple[str, ...] = (), which: int = 0) -> Tensor:
    """Predict by hand: one conditioning after the other, with blocks replaced by identities."""
    model = zoo.without(patcher.model.diffusion_model, list(layers))
    total, weight = torch.zeros_like(X), 0.0
    for one in cond:
        options = {"cond_or_uncond": [which], "uuids": [one["uuid"]]}
        total += one["strength"] * (X - sigma * model(X, one["text"].expand(len(X), -1, -1), options))
        weight += one["strength"]
    return total / weight


def made(patcher: Patcher) -> list[stg.Predictor]:
    guidance = patcher.model_options["sampler_post_cfg_function"][-1].__self__
    return list(guidance._made[1].values())


@pytest.mark.parametrize("per_call", [1, 2, 99])
@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_a_step(patcher: Patcher, cfg: float, per_call: int) -> None:
    positive, negative = [prompt(1), prompt(2, 0.5)], [prompt(3)]
    c, w = predicted(patcher, positive), predicted(patcher, positive, layers=("blocks.2",))
    u = predicted(patcher, negative, which=1)
    guided = guide(patcher, scale=1.5)
    before = [dict(vars(module)) for module in patcher.model.diffusion_model.modules()]
    for _ in range(2):
        got = Guider(guided, cfg, positive, negative, per_call=per_call)(X, 1.0)
        assert_close(got, u + cfg * (c - u) + 1.5 * (c - w) if cfg != 1 else c + 1.5 * (c - w), **close)
    assert [dict(vars(module)) for module in patcher.model.diffusion_model.modules()] == before
    (predictor,) = made(guided)
    assert predictor.stats.blocks_run == predictor.stats.weak_passes  # the last one of four
    assert predictor.stats.weak_passes == {1: 4, 2: 4 if cfg != 1 else 2, 99: 2}[per_call]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_prepares_the_model_once_and_leaves_nothing(
    patcher: Patcher, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    positive, negative, sigmas = [prompt(1)], [prompt(3)], (1.0, 0.7, 0.4, 0.0)
    module = patcher.model.diffusion_model
    guided, installed = guide(patcher), []
    once = stg.Predictor.installed
    monkeypatch.setattr(stg.Predictor, "installed", lambda self: installed.append(1) or once(self))
    x = X
    for sigma, lower in itertools.pairwise(sigmas):
        x = x + (lower - sigma) * (x - Guider(guided, 3.0, positive, negative)(x, sigma)) / sigma
    assert len(installed) == 3  # outside of a run, for each call
    before = {name: dict(vars(one)) for name, one in module.named_modules()}
    installed.clear()
    if fails:
        guided.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * (1 // int(args["sigma"][0] > 0.8)))
        with pytest.raises(ZeroDivisionError):  # in the second step
            Guider(guided, 3.0, positive, negative).sample(X, sigmas)
        assert len(installed) == 1
    else:
        assert_close(Guider(guided, 3.0, positive, negative).sample(X, sigmas), x, **close)
        assert len(installed) == 1
    assert {name: dict(vars(one)) for name, one in module.named_modules()} == before


def test_rescale_is_per_sample(patcher: Patcher) -> None:
    positive, negative = [prompt(1)], [prompt(3)]
    c, w = predicted(patcher, positive), predicted(patcher, positive, layers=("blocks.1",))
    u = predicted(patcher, negative, which=1)
    out = u + 4.0 * (c - u) + 2.0 * (c - w)
    expected = out * (0.7 * c.std((1, 2), keepdim=True) / out.std((1, 2), keepdim=True) + 0.3)
    got = Guider(guide(patcher, "1", scale=2.0, rescale=0.7), 4.0, positive, negative)(X, 1.0)
    assert_close(got, expected, **close)


def test_terms_of_two_nodes_and_clones(patcher: Patcher) -> None:
    positive, negative = [prompt(1)], [prompt(3)]
    one = guide(patcher, "2", scale=1.0)
    two = guide(one, "1", "values", scale=0.5)
    plain = Guider(patcher, 3.0, positive, negative)(X, 1.0)
    alone = Guider(one, 3.0, positive, negative)(X, 1.0)
    other = Guider(guide(patcher, "1", "values", scale=0.5), 3.0, positive, negative)(X, 1.0)
    assert_close(Guider(two, 3.0, positive, negative)(X, 1.0), alone + other - plain, **close)
    assert_close(Guider(one.clone(), 3.0, positive, negative)(X, 1.0), alone, **exact)
    assert_close(Guider(patcher, 3.0, positive, negative)(X, 1.0), plain, **exact)


def test_an_extra_pass_of_another_node_is_left_alone(patcher: Patcher) -> None:
    guided = guide(patcher)
    positive, negative, seen = [prompt(1)], [prompt(3)], []

    def perturbed(args: dict[str, Any]) -> Tensor:
        options = args["model_options"]
        (found,) = comfy_stand_in.calc_cond_batch(args["model"], [args["cond"]], X, args["sigma"], options)
        seen.append(found)
        return args["denoised"] + 0 * found

    expected = Guider(guided, 3.0, positive, negative)(X, 1.0)
    (predictor,) = made(guided)
    passes = predictor.stats.weak_passes
    guided.set_model_sampler_post_cfg_function(perturbed)
    assert_close(Guider(guided, 3.0, positive, negative)(X, 1.0), expected, **close)
    assert_close(seen[0], predicted(patcher, positive), **close)
    assert predictor.stats.weak_passes == 2 * passes


def test_a_guider_that_calls_none_of_the_wrappers(patcher: Patcher) -> None:
    """Then a full weak pass is made."""
    positive = [prompt(1)]
    guided = guide(patcher, scale=1.5)
    options = guided.model_options
    c, w = predicted(patcher, positive), predicted(patcher, positive, layers=("blocks.2",))
    given = {"denoised": c, "cond": positive, "uncond": None, "cond_scale": 1.0, "model": patcher.model}
    given |= {"cond_denoised": c, "uncond_denoised": c, "sigma": torch.ones(2), "input": X, "model_options": options}
    (function,) = options["sampler_post_cfg_function"]
    assert_close(function(given), c + 1.5 * (c - w), **close)


def test_lists_by_noise_level(patcher: Patcher) -> None:
    """The lowest listed level that is not below a step's counts; above the highest one, the last entry."""
    positive, negative = [prompt(1)], [prompt(3)]
    guided = guide(
        patcher,
        "1",
        sigmas="0.9, 0.5, 0.2",
        scale_by_sigma="[3, 2, 0]",
        cfg_by_sigma="6 3 1",
        rescale_by_sigma="0, 0, 0",
        layers_by_sigma="[1], [2, 3], []",
        sigma_max=0.95,
    )
    levels = {
        0.95: (0.0, 1.0, ()),
        0.9: (3.0, 6.0, (1,)),
        0.6: (3.0, 6.0, (1,)),
        0.5: (2.0, 3.0, (2, 3)),
        0.1: (0, 1, ()),
    }
    for sigma, (scale, cfg, layers) in levels.items():
        c, u = predicted(patcher, positive, sigma), predicted(patcher, negative, sigma, which=1)
        w = predicted(patcher, positive, sigma, tuple(f"blocks.{i}" for i in layers))
        for own in (1.0, 5.0):
            got = Guider(guided, own, positive, negative)(X, sigma)
            assert_close(got, u + cfg * (c - u) + scale * (c - w), **close)


def test_windows(patcher: Patcher) -> None:
    positive, negative = [prompt(1)], [prompt(3)]
    for given in ({"start_percent": 0.2, "end_percent": 0.6}, {"sigma_min": 0.4, "sigma_max": 0.8}):
        guided = guide(patcher, **given)
        for sigma, is_on in ((0.9, False), (0.8, True), (0.4, True), (0.3, False)):
            got = Guider(guided, 3.0, positive, negative)(X, sigma)
            plain = Guider(patcher, 3.0, positive, negative)(X, sigma)
            assert torch.equal(got, plain) != is_on
        assert made(guided)[0].stats.weak_passes == 2


def test_the_model_is_not_called_above_a_noise_level(patcher: Patcher) -> None:
    guided = guide(patcher, zero_above_sigma=0.998)
    with pytest.raises(TypeError):  # the guider below cannot call a model
        Guider(guided, 3.0, None, 5)(X, 0.9)
    assert_close(Guider(guided, 3.0, None, 5)(X, 1.0), torch.zeros_like(X), **exact)


def test_the_uncond_prediction_of_the_weak_model(patcher: Patcher) -> None:
    positive, negative = [prompt(1)], [prompt(3)]
    c = predicted(patcher, positive)
    w = predicted(patcher, negative, layers=("blocks.2",), which=1)
    guided = guide(patcher, on="uncond")
    assert_close(Guider(guided, 3.0, positive, negative)(X, 1.0), w + 3.0 * (c - w), **close)
    with pytest.raises(stg.CallError, match="set its CFG above 1, or use on='cond'"):
        Guider(guided, 1.0, positive, negative)(X, 1.0)


@pytest.mark.parametrize("rule", ["zero_star", "apg", "orthogonal"])
def test_rules(patcher: Patcher, rule: str) -> None:
    positive, negative = [prompt(1)], [prompt(3)]
    c, w = predicted(patcher, positive), predicted(patcher, positive, layers=("blocks.2",))
    u = predicted(patcher, negative, which=1)
    expected = stg.combine(c, w, u, guidance_scale=3.0, rule=rule, rescale=0.5)
    guided = guide(patcher, rule=rule, rescale=0.5)
    assert_close(Guider(guided, 3.0, positive, negative)(X, 1.0), expected, **close)
    with pytest.raises(stg.CallError, match="and so does another node of this model"):
        Guider(guided, 3.0, positive, negative, sampler_cfg_function=lambda args: args["cond"])(X, 1.0)


def test_a_rule_that_remembers_the_steps(patcher: Patcher) -> None:
    positive, negative, module = [prompt(1)], [prompt(3)], patcher.model.diffusion_model
    rule, same = (stg.rules.AveragedApg(momentum=-0.5) for _ in range(2))
    guided = SkipGuidance(module, Request(layers=[2], rule=rule)).patch(patcher)
    sigmas = torch.tensor([1.0, 0.7, 0.0])
    for i, sigma in enumerate((1.0, 0.7)):
        c, w = predicted(patcher, positive, sigma), predicted(patcher, positive, sigma, layers=("blocks.2",))
        u = predicted(patcher, negative, sigma, which=1)
        expected = stg.combine(c, w, u, guidance_scale=3.0, rule=same.at(stg.Step(i, 2), 0))
        got = Guider(guided, 3.0, positive, negative, sample_sigmas=sigmas)(X, sigma)
        assert_close(got, expected, **close)
    assert not torch.allclose(got, stg.combine(c, w, u, guidance_scale=3.0, rule="apg(eta=1)"), atol=1e-3)


@pytest.mark.parametrize("in_weak_pass", [False, True])
def test_an_interrupt_leaves_nothing(patcher: Patcher, in_weak_pass: bool) -> None:
    positive, negative, module = [prompt(1)], [prompt(3)], patcher.model.diffusion_model
    guided = guide(patcher, "1", "values")
    expected = Guider(guided, 3.0, positive, negative)(X, 1.0)

    def interrupt(*_: Any) -> None:
        if stg.Predictor.in_weak_pass() == in_weak_pass:
            raise KeyboardInterrupt

    handle = module.blocks[2].register_forward_pre_hook(interrupt)  # type: ignore[index, union-attr]
    before = {name: dict(vars(one)) for name, one in module.named_modules()}
    with pytest.raises(KeyboardInterrupt):
        Guider(guided, 3.0, positive, negative)(X, 1.0)
    assert {name: dict(vars(one)) for name, one in module.named_modules()} == before
    handle.remove()
    assert_close(Guider(guided, 3.0, positive, negative)(X, 1.0), expected, **exact)


# --- attention --------------------------------------------------------------------------------------------------------


def opaque(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    with torch._C.DisableTorchFunction():
        return comfy_stand_in.attention_pytorch(q, k, v, heads)


class Attention(nn.Module):
    """Computes its attention with a function that torch does not show, unless the options name another one."""

    __module__ = "comfy.ldm.stand_in"

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(zoo.DIM, zoo.DIM) for _ in range(3))

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        given = self.q(x), self.k(x), self.v(x), 2
        override = options.get("optimized_attention_override")
        found: Tensor = opaque(*given) if override is None else override(opaque, *given)
        return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        out: Tensor = x + self.attn(x, options)
        return out


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        for block in self.blocks:
            x = block(x, options)
        return x + text.mean()


def test_attention_is_seen_whatever_the_backend() -> None:
    torch.manual_seed(0)
    patcher = Patcher(Model(Attending().eval().requires_grad_(False)))
    positive, negative, calls = [prompt(1)], [prompt(3)], []

    def theirs(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return function(*args, **kwargs)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = theirs
    weak = Patcher(Model(copy.deepcopy(patcher.model.diffusion_model)))
    attention = weak.model.diffusion_model.blocks[1].attn  # type: ignore[index, union-attr]
    attention.forward = lambda x, options: attention.v(x)
    c, w = (Guider(one, 1.0, positive, negative)(X, 1.0) for one in (patcher, weak))
    calls.clear()
    guided = guide(patcher, "1", "values")
    Guider(guided, 1.0, positive, negative)(X, 1.0)
    calls.clear()
    assert_close(Guider(guided, 1.0, positive, negative)(X, 1.0), c + (c - w), **close)
    assert len(calls) == 3 + 1  # all blocks of the call, and the last one of the weak pass


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("14, 19", [14, 19]),
        ("[14,19]", [14, 19]),
        ("14 19;20\n21", [14, 19, 20, 21]),
        ("8-11", [8, 9, 10, 11]),
        ("8 - 10, 3", [8, 9, 10, 3]),
        ("-1", [-1]),
        ("-3--1", [-3, -2, -1]),
        ("single_blocks.3", ["single_blocks.3"]),
        ("single_blocks.3-5", ["single_blocks.3", "single_blocks.4", "single_blocks.5"]),
        ("double_blocks.*.img_attn", ["double_blocks.*.img_attn"]),
        ('"mid_block-1x"', ["mid_block-1x"]),
        ("", []),
    ],
)
def test_layers_as_text(text: str, layers: list[int | str]) -> None:
    assert fields.layers_from(text) == layers


@pytest.mark.parametrize("text", ["11-8", "-1-3", "1.5", "14 / 19", "0-99999", "5-"])
def test_text_that_names_no_layers(text: str) -> None:
    with pytest.raises(stg.SettingError, match="layers: cannot read"):
        fields.layers_from(text)


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ("[29], [29], [11, 25]", [[29], [29], [11, 25]]),
        ("[[29], [2-4], []]", [[29], [2, 3, 4], []]),
        ("29, 28", [[29], [28]]),
        ("[1]", [[1]]),
    ],
)
def test_lists_of_layers(text: str, lists: list[list[int | str]]) -> None:
    assert fields.layer_lists_from(text, "layers by sigma") == lists


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigmas": "1, 0.5", "scale_by_sigma": "1"}, "scale by sigma has 1 entries, but there are 2 sigmas"),
        ({"sigmas": "1, x"}, "sigmas: cannot read 'x' as a number"),
        ({"scale_by_sigma": "1, nan"}, "scale by sigma: cannot read 'nan'"),
        ({"sigmas": "1, 1", "scale_by_sigma": "1, 2"}, "each once"),
        ({"sigmas": "1, 0.5"}, "at least one list"),
        ({"sigmas": "1", "rescale_by_sigma": "2"}, "rescale=2.0: expected a number from 0.0"),
        ({"sigmas": "1", "layers_by_sigma": "[99]"}, r"layers=\[99\]: Denoiser has 4 layers"),
        ({"layers": "1, 4"}, r"layers=\[4\]: Denoiser has 4 layers"),
        ({"layers": "blocks.9"}, r"Denoiser has no module of that name"),
        ({"layers": ""}, "no setting is published for this Denoiser"),
        ({"start_percent": 0.6, "end_percent": 0.5}, "expected 0 <= start <= end <= 1"),
        ({"sigma_min": 0.6, "sigma_max": 0.5}, "the first one is the lowest noise level"),
        ({"preset": "Mochi 1"}, "leave layers empty"),
        ({"preset": "Mochi 1", "layers": ""}, "is for a MochiTransformer3DModel"),
        ({"mode": "attention", "layers": "blocks.0.mlp"}, "no module of that name|has no attention"),
    ],
)
def test_errors_of_a_node_come_before_sampling(patcher: Patcher, given: dict[str, Any], message: str) -> None:
    with pytest.raises(stg.StgError, match=message):
        guide(patcher, **given)


def test_published_settings_fill_empty_fields() -> None:
    class LTXVModel(Denoiser):
        pass

    torch.manual_seed(0)
    model = LTXVModel(depth=1).eval().requires_grad_(False)
    model.transformer_blocks = model.blocks
    for _ in range(27):
        model.blocks.append(model.blocks[0].__class__())
    patcher = Patcher(Model(model.requires_grad_(False)))
    guided, info = nodes.STGGuidance().guide(patcher)
    settings = guided.model_options["sampler_post_cfg_function"][-1].__self__.settings
    assert [(branch.layers, branch.mode, branch.scale) for branch in settings.branches] == [([19], "residual", 1.0)]
    assert "arXiv 2411.18664" in info
    guided, info = nodes.STGGuidanceAdvanced().guide(patcher, preset="LTX-Video 2B (0.9 to 0.9.6-dev), Lightricks")
    settings = guided.model_options["sampler_post_cfg_function"][-1].__self__.settings
    assert (settings.branches[0].mode, settings.rescale) == ("values", 0.7)
    assert "ltxv-2b-0.9.6-dev.yaml" in info


def test_modes_and_their_values_in_fields(patcher: Patcher) -> None:
    def branches(*args: Any, **given: Any) -> list[Any]:
        found = nodes.STGGuidanceAdvanced().guide(patcher, *args, **given)[0]
        settings = found.model_options["sampler_post_cfg_function"][-1].__self__.settings
        return [(branch.layers, branch.mode) for branch in settings.branches]

    assert branches("0-1:values, 2", "feed-forward") == [({0: "values", 1: "values", 2: "feed-forward"}, "residual")]
    assert branches("1:values, 2") == [({1: "values", 2: "residual"}, "residual")]
    assert branches(r"re:blocks\.(1|2)$", "values") == [([r"re:blocks\.(1|2)$"], "values")]
    assert branches("1", "dropout", mode_values="p=0.3") == [([1], "dropout(p=0.3)")]
    for bad, message in (({"layers": "1:valuse"}, "valuse"), ({"layers": "1", "mode_values": "p=2"}, "mode=")):
        with pytest.raises(stg.SettingError, match=message):
            branches(**{"mode": "dropout", **bad})


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_each_field_is_an_argument_with_its_default_and_a_tooltip() -> None:
    import inspect

    for node in nodes.NODES:
        function = inspect.signature(getattr(node, node.FUNCTION))
        for group in node.INPUT_TYPES().values():
            for name, (kind, details) in group.items():
                assert len(details["tooltip"]) > 10
                default = function.parameters[name].default
                if name != "model":
                    assert default == details["default"]
                if isinstance(kind, list):
                    assert details["default"] in kind
                if kind == "FLOAT":
                    assert details["min"] <= details["default"] <= details["max"]
    advanced = nodes.STGGuidanceAdvanced.INPUT_TYPES()
    assert set(function.parameters) >= {"model"}
    assert {*advanced["required"], *advanced["optional"]} == {
        name for name in inspect.signature(nodes.STGGuidance.guide).parameters if name != "self"
    }


def test_the_layers_of_a_model_as_text(patcher: Patcher) -> None:
    found = nodes.STGLayers().show(patcher)
    assert found["result"] == (str(stg.layers(patcher.model.diffusion_model)),)
    assert found["ui"]["text"] == [*found["result"]]


def test_the_folder_is_an_entry_of_custom_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, without ComfyUI: loading it imports no host."""
    assert entry.main([str(tmp_path)]) == 1
    assert "has no folder custom_nodes: name the folder of ComfyUI" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    assert [entry.main([str(tmp_path)]) for _ in range(2)] == [0, 0]  # the second time, over the first
    (installed,) = (tmp_path / "custom_nodes").iterdir()
    assert len((installed / "__init__.py").read_text(encoding="utf-8").splitlines()) == 2
    assert (installed / "example_workflows" / Path(WORKFLOW).name).is_file()
    code = """
import importlib.util, sys
for number, folder in enumerate(sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"pack{number}", f"{folder}/__init__.py")
    sys.modules[f"pack{number}"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert not {"comfy", "comfy_api"} & set(sys.modules)
    print(*sorted(pack.NODE_CLASS_MAPPINGS), callable(pack.comfy_entrypoint))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, installed, Path(nodes.__file__).parent],
        env=os.environ | {"PYTHONPATH": str(Path(stg.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["STGGuidance STGGuidanceAdvanced STGLayers True"] * 2


def test_the_example_workflow_and_its_picture() -> None:
    workflow = json.loads((ROOT / WORKFLOW).read_text(encoding="utf-8"))
    known = {node["id"]: node for node in workflow["nodes"]}
    assert len(known) == workflow["last_node_id"]
    for number, source, slot, target, place, kind in workflow["links"]:
        output, given = known[source]["outputs"][slot], known[target]["inputs"][place]
        assert number in output["links"]
        assert given["link"] == number
        assert output["type"] == kind
        assert given["type"] in (kind, "*")
    (ours,) = (node for node in workflow["nodes"] if node["type"] == "STGGuidance")
    required = nodes.STGGuidance.INPUT_TYPES()["required"]
    assert [given["name"] for given in ours["inputs"]] == ["model"]
    assert ours["widgets_values"] == [given[1]["default"] for name, given in required.items() if name != "model"]
    assert [(output["name"], output["type"]) for output in ours["outputs"]] == [
        *zip(nodes.STGGuidance.RETURN_NAMES, nodes.STGGuidance.RETURN_TYPES, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "docs/draw_workflow.py", ROOT / WORKFLOW, "/dev/stdout"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (ROOT / "docs/images/comfyui-workflow.svg").read_text(encoding="utf-8")


def test_steps_are_counted_by_the_noise_levels_of_a_run(patcher: Patcher) -> None:
    guided = guide(patcher)
    guidance = guided.model_options["sampler_post_cfg_function"][-1].__self__
    seen: list[Any] = []
    at = guidance._plan.at
    guidance._plan.at = lambda step: seen.append(step) or at(step)
    for sigma in (1.0, 0.7, 0.5):
        Guider(guided, 3.0, [prompt(1)], [prompt(2)])(X, sigma, (1.0, 0.7, 0.5, 0.0))
    assert [(step.index, step.count) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    assert all(math.isclose(step.sigma, sigma, rel_tol=1e-6) for step, sigma in zip(seen, (1, 0.7, 0.5), strict=True))
