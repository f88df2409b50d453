"""What the ranks of test_parallel.py do: predictions that are made together are those that one process makes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import ranks, zoo

X, POSITIVE = zoo.inputs().values()
NEGATIVE = zoo.inputs(seed=7)["text"]
ROWS = {"x": torch.cat([X, X]), "text": torch.cat([NEGATIVE, POSITIVE])}


def groups(size: int) -> dict[int, dist.ProcessGroup]:
    """New groups of the first 1, 2... ranks: what breaks one of them leaves those of other checks alone."""
    return {n: dist.new_group(list(range(n)), backend="gloo") for n in range(1, size + 1)}


class Counted:
    """Counts the calls of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


def parts(*names: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the textbook needs, with blocks replaced by hand: cond, weak predictions and uncond."""
    model = zoo.build("plain")
    return model(X, POSITIVE), [zoo.without(model, [name])(X, POSITIVE) for name in names], model(X, NEGATIVE)


def combined(**settings: Any) -> Tensor:
    cond, weaks, uncond = parts("blocks.2")
    return stg.combine(cond, weaks, uncond, scale=1.0, guidance_scale=3.0, **settings)


def check_guider(rank: int, size: int) -> None:
    cond, weaks, uncond = parts("blocks.2", "blocks.1")
    two = [stg.Branch(["blocks.2"], 1.0), stg.Branch(["blocks.1"], 0.5)]
    settings: list[tuple[dict[str, Any], Tensor, int]] = [
        ({"layers": ["blocks.2"], "rescale": 0.7}, combined(rescale=0.7), 3),
        ({"branches": two}, stg.combine(cond, weaks, uncond, scale=[1.0, 0.5], guidance_scale=3.0), 4),
        ({"layers": ["blocks.2"], "scale": 0.0}, stg.combine(cond, [], uncond, scale=[], guidance_scale=3.0), 2),
        (
            {"layers": ["blocks.2"], "rule": "zero_star"},
            combined(rule="zero_star"),
            3,
        ),
    ]
    for n, group in groups(size).items():
        if rank >= n:
            continue
        for execution in ("auto", "full", "batched") if n == 2 else ("auto",):
            for given, expected, predictions in settings:
                model = zoo.build("plain")
                guider = stg.Guider(model, guidance_scale=3.0, execution=execution, group=group, timeout=30, **given)
                found = guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
                assert_close(found, expected)
                ranks.same_on_all(found, group)
                counted = Counted(model)
                assert_close(guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected)
                if n >= predictions:
                    assert counted.count == 1  # as long as one forward
            alone = stg.Guider(zoo.build("plain"), ["blocks.2"], execution=execution, group=group, timeout=30)
            assert_close(alone(X, cond={"text": POSITIVE}), stg.combine(cond, weaks[0], scale=1.0))


def check_guider_in_a_loop(rank: int, size: int) -> None:
    """A sampler that asks denoiser(x, sigma), with settings that change; random noise of its own between the steps."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.build("plain")

        def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            return self.inner(x, text) * sigma[:, None, None]

    def sampled(group: dist.ProcessGroup | None) -> Tensor:
        torch.manual_seed(5)
        sigmas = torch.linspace(1, 0, 6)
        guider = stg.Guider(
            Denoiser(),
            ["blocks.2"],
            lambda step: 2.0 - step.fraction,
            guidance_scale=2.0,
            start=0.2,
            sigmas=sigmas,
            group=group,
            timeout=30,
        )
        x = torch.randn_like(X)
        for sigma in sigmas[:-1]:
            found = guider(x, sigma.expand(2), cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
            x = x + 0.2 * found + 0.1 * torch.randn_like(x)
        assert len(guider.trace) == 4
        return x

    expected = sampled(None)
    for n, group in groups(size).items():
        if rank < n:
            found = sampled(group)
            assert_close(found, expected)
            ranks.same_on_all(found, group)


def check_module(rank: int, size: int) -> None:
    """A module whose rows are [uncond, cond], or all cond: what one process gives, in every kind of step."""
    kinds: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({"batched_cfg": True}, ROWS),
        ({"batched_cfg": True, "guidance_scale": 2.0, "rescale": 0.6}, ROWS),
        ({"batched_cfg": True, "guidance_scale": 2.0, "rule": "apg"}, ROWS),
        ({}, {"x": X, "text": POSITIVE}),
        ({"start": 0.4, "batched_cfg": True}, ROWS),
        ({"every": 2, "batched_cfg": True}, ROWS),
    ]

    def sampled(given: dict[str, Any], call: dict[str, Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
        model, found = zoo.build("plain"), []
        x = call["x"]
        with stg.apply(model, ["blocks.1"], 1.5, group=group, timeout=30, **given) as session:
            counted = Counted(model)
            for index in range(4):
                session.step = stg.Step(index, 4)
                found.append(model(**{**call, "x": x}))
                x = x + 0.3 * found[-1]
        count = counted.count
        assert_close(model(**call), zoo.build("plain")(**call), rtol=0, atol=0)
        return torch.stack(found), count

    for n, group in groups(size).items():
        if rank < n:
            for given, call in kinds:
                found, calls = sampled(given, call, group)
                assert_close(found, sampled(given, call, None)[0])
                ranks.same_on_all(found, group)
                assert n < 3 or calls == 4  # as many forwards as steps


def check_pairs_of_ranks(rank: int, size: int) -> None:
    """Groups that do not begin with rank 0."""
    group = dist.new_group([1, 2])
    if rank in (1, 2):
        guider = stg.Guider(zoo.build("plain"), ["blocks.2"], 1.0, guidance_scale=3.0, group=group, timeout=30)
        found = guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
        assert_close(found, combined())


def told(run: Callable[[], object], pattern: str, error: type[BaseException] = stg.RankError) -> None:
    with pytest.raises(error, match=pattern):
        run()


def check_disagreement(rank: int, size: int) -> None:
    """Whatever differs between the ranks, all of them say what it is, and go on together afterwards."""
    group = groups(size)[size]
    odd = rank == 1

    def guided(seed: int = 0, x: Tensor = X, **given: Any) -> Tensor:
        settings: dict[str, Any] = {"layers": ["blocks.2"], "scale": 1.0, "guidance_scale": 3.0, **given}
        guider = stg.Guider(zoo.build("plain", seed), group=group, timeout=30, **settings)
        found: Tensor = guider(x, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
        return found

    expected = combined()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scale": 1.01}, r"branches is .*1\.0.* but .*1\.0.* on rank"),
        ({"scale": 0.0}, "branches is"),
        ({"layers": ["blocks.1"]}, r"branches is .*blocks\.[12].* but .*blocks\.[12]"),
        ({"mode": "values"}, "branches is"),
        ({"guidance_scale": 2.0}, r"guidance_scale is .*3\.0|guidance_scale is 2\.0"),
        ({"rescale": 0.5}, "rescale is"),
        ({"rule": "zero_star"}, "rule is"),
        ({"x": X + 1}, "values of the arguments is"),
        ({"x": X[:1], "layers": ["blocks.2"]}, "Error|shapes is"),
        ({"seed": 1}, "weights is"),
    ]
    for given, pattern in cases:
        if "x" in given and len(given["x"]) == 1 and odd:
            with pytest.raises(Exception):  # noqa: B017 - the call is impossible
                guided(**given)
        else:
            told(lambda given=given: guided(**given if odd else {}), pattern)
        assert_close(guided(), expected)


def check_a_failure_is_told(rank: int, size: int) -> None:
    """The rank that has failed raises its own error, the others say which one it was; then they can go on."""
    group = groups(size)[size]
    model = zoo.build("plain")
    guider = stg.Guider(model, ["blocks.2"], 1.0, guidance_scale=3.0, group=group, timeout=30)

    errors = {torch.OutOfMemoryError: "OutOfMemoryError: no room", KeyboardInterrupt: "KeyboardInterrupt: no room"}
    error: type[BaseException] = torch.OutOfMemoryError

    def fail(*_: Any) -> None:
        raise error("no room")

    def guided() -> Tensor:
        found: Tensor = guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
        return found

    for culprit, (error, text) in itertools.product(range(size), errors.items()):
        hook = model.blocks[3].register_forward_hook(fail) if rank == culprit else None
        if hook is None:
            told(guided, f"rank {culprit} failed where rank {rank} made a call: {text}")
        else:
            told(guided, "no room", error)
            hook.remove()
        assert_close(guided(), combined())

    no_skip = stg.Branch(["blocks.2"], mode=lambda call: call.compute())
    strict = stg.Guider(model, branches=[no_skip], group=group, timeout=30, strict=True)
    culprit = size // 2  # makes the weak prediction, and sees that it equals cond
    if rank == culprit:
        told(lambda: strict(X, POSITIVE), "changed nothing", stg.LayerError)
    else:
        strict(X, POSITIVE)
        told(lambda: strict(X, POSITIVE), f"rank {culprit} failed .* LayerError: .* changed nothing")

    def applied(culprit: int, inside: bool) -> None:
        with stg.apply(model, ["blocks.2"], 1.0, batched_cfg=True, group=group, timeout=30):
            model(**ROWS)
            if rank == culprit and inside:
                fail()
            model(**ROWS)

    for culprit, error in itertools.product(range(size), errors):
        if rank == culprit:
            told(lambda culprit=culprit: applied(culprit, True), "no room", error)
        else:
            told(lambda culprit=culprit: applied(culprit, True), f"rank {culprit} failed .* no room")
        applied(culprit, False)


def check_another_number_of_calls(rank: int, size: int) -> None:
    group = groups(size)[size]
    model = zoo.build("plain")

    def applied() -> None:
        with stg.apply(model, ["blocks.2"], 1.0, batched_cfg=True, group=group, timeout=30):
            for _ in range(2 if rank == 0 else 1):
                model(**ROWS)

    told(applied, "event is .*(leaves|made a call).*, but .*(leaves|made a call)")


def check_refusals(rank: int, size: int) -> None:
    group = groups(size)[size]
    model = zoo.build("plain")
    told(lambda: stg.apply(model, [2], group="all"), "expected a process group", stg.TargetError)
    told(lambda: stg.apply(model, [2], group=group, timeout=-1), "timeout=-1", stg.SettingError)
    told(lambda: stg.apply(model, [2], group=group, on="uncond", batched_cfg=True), "group=", stg.SettingError)
    told(lambda: stg.Guider(model, [2], group=group, on="uncond"), "group=", stg.SettingError)
    spread = nn.parallel.DistributedDataParallel(zoo.build("plain").requires_grad_(True))
    told(lambda: stg.apply(spread, ["blocks.2"], group=group), "itself spread over ranks", stg.SettingError)

    def twice() -> None:
        with stg.apply(model, [2]), stg.apply(model, [1], group=group, timeout=30):
            model(X, POSITIVE)

    def in_a_guider() -> None:
        with stg.apply(model, [1], group=group, timeout=30):
            stg.Guider(model, [2])(X, POSITIVE)

    for wrong in (twice, in_a_guider):
        told(wrong, "guided twice", stg.CallError)

    def odd_rows() -> None:
        with stg.apply(model, [2], batched_cfg=True, group=group, timeout=30):
            model(X[:1], POSITIVE[:1])

    told(odd_rows, "a call with 1 rows", stg.CallError)
    guider = stg.Guider(zoo.build("plain").requires_grad_(True), [2], group=group, timeout=30)
    told(lambda: guider(X, POSITIVE), "gradients cannot", stg.CallError)
    with torch.no_grad():
        guider(X, POSITIVE)


def check_a_rank_that_is_late(rank: int, size: int) -> None:
    group = groups(size)[size]
    model = zoo.build("plain")
    guider = stg.Guider(model, ["blocks.2"], 1.0, group=group, timeout=1.5)
    guider(X, POSITIVE)
    if rank == 1:
        time.sleep(3)
    start = time.monotonic()
    told(lambda: guider(X, POSITIVE), f"rank {rank} of {size} has lost the others .no answer from rank")
    assert time.monotonic() - start < 10
    told(lambda: guider(X, POSITIVE), "cannot be used any more")


def check_a_rank_that_never_comes(rank: int, size: int) -> None:
    group = groups(size)[size]
    if rank != 1:
        guider = stg.Guider(zoo.build("plain"), ["blocks.2"], 1.0, group=group, timeout=1.5)
        told(lambda: guider(X, POSITIVE), "not all 3 ranks of the group have come within 1.5 s")


def check_a_rank_that_dies(rank: int, size: int) -> None:
    """The last check: from here on there is a rank less."""
    group = groups(size)[size]
    model = zoo.build("plain")
    guider = stg.Guider(model, ["blocks.2"], 1.0, guidance_scale=3.0, group=group, timeout=20)
    guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
    if rank == 2:
        os._exit(1)
    start = time.monotonic()
    told(lambda: guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), "no answer from rank")
    assert time.monotonic() - start < 30


CHECKS: dict[str, ranks.Check] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
