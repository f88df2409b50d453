"""What the calls of a denoiser in a pipeline's code are for, as its names say, and how predictions are combined.

A pipeline says it by names: of a `cache_context("cond")` around the call, of what it passes (`negative_prompt_embeds`),
and of the halves that it takes a result apart into (`uncond, cond = prediction.chunk(2)`). Where names say nothing, the
weights may, with which it combines two predictions. The conditions under which it does all that stand there as well.
Nothing is executed here: conditions and weights are evaluated in the running pipeline (`call_roles`).
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeGuard

from stg_hooks.integrations.diffusers.combinations import (
    Combination,
    Found,
    Guards,
    blend_of,
    combination_of,
    mentions,
    names_in,
    tail,
)

# Names of cache contexts, and of the guiders' batches.
KINDS = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond", "cond_uncond": "both"}

_UNCOND = re.compile(r"(^|_)(neg|negative|uncond|unconditional|null)(_|$)")
# What a part of a prediction is, by its name; the first that fits. Others are cond.
_LABELS = {
    "apart": re.compile(r"^_$"),
    "uncond": _UNCOND,
    "perturbed": re.compile(r"(^|_)(perturb|perturbed)(_|$)"),
    "image": re.compile(r"(^|_)(img|image)(_|$)"),
}
_GUIDED = re.compile(r"(^|_)(uncond|unconditional|cfg|classifier_free)(_|$)")
# What turns a velocity into a clean sample is called.
_TO_CLEAN = re.compile(r"velocity_to_(x0|clean|sample)$")
_IN_TURN, _ZERO = "in turn", ast.Constant(0)
_CUTS = ("chunk", "split", "tensor_split", "unbind")


class UnreadableError(Exception):
    """The calls of a denoiser do not follow any known pattern; the message says which calls."""


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """One way in which the rows of a call are taken apart, while `guards` hold; `rows` are as those of a role.

    If they are `in_turn`, these are the labels of the first rows, and the next ones have the same again.
    """

    rows: str
    guards: Guards
    combinations: tuple[Combination, ...]
    uncond_follows: bool = False
    is_named: bool = True
    prediction: str = ""
    """What is taken apart, of several predictions."""
    in_turn: bool = False


@dataclasses.dataclass(frozen=True)
class CallSite:
    """A call of a denoiser in a function's code."""

    lines: range
    kind: str
    """What it is for: `"cond"`, `"uncond"`, `"both"` (rows of several kinds, in one of the `splits`, or cond),
    `"samples"` (a list of samples, the first half cond and the second half uncond, while `guards` hold),
    `"perturbed"` (a weak prediction of the pipeline's own), `"named"` (what `context` says when it runs), or
    `"unused"`."""
    context: ast.expr | None = None
    """The name that the code gives the call when it runs."""
    batches: ast.expr | None = None
    """What the loop around it goes through, one call each."""
    guards: Guards | None = None
    """For a cond call: the conditions under which the uncond call follows; `None` if none does."""
    combination: Combination | None = None
    splits: tuple[RowSplit, ...] = ()
    unless: ast.expr | None = None
    """While it holds, the prediction is guided in some way that is not understood."""
    channels: ast.expr | None = None
    """How many channels of the prediction are guided, where the others predict a variance."""
    is_named: bool = True
    """A name says what the call is for. Otherwise `kind` is what it can be, which its weight and latents decide."""
    predictions: tuple[str, ...] = ()
    """The names of what it returns."""
    are_clean: bool = False
    """These are turned into clean samples before they are combined."""
    when: Guards = ()
    """The conditions under which it is made."""
    isolates: bool = False
    """It asks for streams that do not attend to each other."""


def classified(calls: Sequence[tuple[Found, ast.Call]], statements: Sequence[Found]) -> Iterator[CallSite]:
    """Tell what each call in a function is for.

    Raises:
        UnreadableError: it cannot be told.
    """
    kinds = [_kind(found, call) for found, call in calls]
    founds = [found for found, _ in calls]
    splits = _named_splits(statements)
    sliced = _sliced(founds[0], statements) if kinds == ["cond"] and not splits else None
    if sliced is not None:
        yield sliced
        return
    is_named = bool(splits) or not set(kinds) <= {"cond", "unused", "perturbed"}
    if not is_named:
        splits, kinds = _by_weights(founds, kinds, statements)
    unless = None
    if not splits and "uncond" not in kinds and "named" not in kinds:
        unless = _switch_of_guidance(founds, statements)
    _check_apart(kinds, founds)
    if splits and "uncond" not in kinds:
        kinds = ["both" if kind == "cond" else kind for kind in kinds]
    boths = [found for kind, found in zip(kinds, founds, strict=True) if kind == "both"]
    cond, uncond = (founds[kinds.index(kind)] if kind in kinds else None for kind in ("cond", "uncond"))
    pair = None if cond is None or uncond is None else _pair(cond, uncond, statements, is_named)
    for kind, found in zip(kinds, founds, strict=True):
        if kind == "named":
            yield CallSite(found.lines, "named", found.context, found.batches)
        elif kind == "both":
            yield _site_of_both(found, boths, splits, statements, is_named)
        elif kind == "cond" and uncond is not None:
            guards = tuple(guard for guard in uncond.guards if guard not in found.guards)
            yield CallSite(found.lines, kind, guards=guards, combination=pair, is_named=is_named)
        elif kind == "uncond":
            yield CallSite(found.lines, kind, combination=pair, is_named=is_named)
        else:
            yield CallSite(found.lines, kind, unless=unless, is_named=kind != "cond" or found.context is not None)


def _check_apart(kinds: Sequence[str], founds: Sequence[Found]) -> None:
    """Raise where calls without a context of their own are for uncond, but not one for cond and one for uncond."""
    apart = [kind for kind, found in zip(kinds, founds, strict=True) if found.context is None]
    apart = [kind for kind in apart if kind not in ("perturbed", "unused")]
    if "uncond" in apart and sorted(apart) != ["cond", "uncond"]:
        raise UnreadableError(f"it makes {len(apart)} different calls, not one for cond and one for uncond")


def _pair(cond: Found, uncond: Found, statements: Sequence[Found], is_named: bool) -> Combination | None:
    """Find where the predictions of two calls are combined."""
    if uncond.statement.lineno < cond.statement.lineno:
        raise UnreadableError("it calls its denoiser for uncond first, before the cond prediction is known")
    return combination_of((cond, uncond), [cond.target, uncond.target], statements, is_named)


def _site_of_both(
    found: Found, boths: Sequence[Found], splits: Sequence[_Split], statements: Sequence[Found], is_named: bool
) -> CallSite:
    """Tell how the rows of a call are split, or that it perturbs what an earlier one made."""
    own = [split for split in splits if _made_by(split, boths) is found]
    is_last = all(split.found.statement.lineno < found.statement.lineno for split in splits)
    blend = blend_of(found, statements) if is_last and not own else None
    if blend is not None:
        return CallSite(found.lines, "perturbed", combination=blend)
    row_splits = tuple(_row_splits(found, boths, splits, statements, is_named))
    return CallSite(found.lines, "both", splits=row_splits, is_named=is_named)


def described(
    sites: Sequence[CallSite], calls: Sequence[tuple[Found, ast.Call]], statements: Sequence[Found]
) -> Iterator[CallSite]:
    """Add to sites, one for each call, what does not depend on what the calls are for."""
    channels = channels_of(statements)
    for site, (found, call) in zip(sites, calls, strict=True):
        converted = [
            word for other in statements if _is_to_clean(other.value) and other.value for word in names_in(other.value)
        ]
        yield dataclasses.replace(
            site,
            channels=channels,
            predictions=found.targets,
            are_clean=found.target in converted,
            when=found.guards,
            isolates=any("isolat" in (word.arg or "") and _is_true(word.value) for word in call.keywords),
        )


def _is_to_clean(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and _TO_CLEAN.search(tail(value.func)) is not None


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _kind(found: Found, call: ast.Call) -> str:
    """Return what one call is for, by its name or else by what is passed to it."""
    if isinstance(found.context, ast.Constant):
        return KINDS.get(str(found.context.value), "perturbed")
    if found.context is not None:
        return "named"
    if isinstance(found.statement, ast.Expr):
        raise UnreadableError("it looks into its denoiser after a call, and would find what the weak pass left there")
    if found.target == "_":
        return "unused"
    if any(keyword.arg == "skip_layers" for keyword in call.keywords):
        return "perturbed"
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    inner = [node for value in values for node in ast.walk(value) if isinstance(node, ast.Call)]
    if any(tail(node.func) in ("cat", "concat", "stack") and mentions(_UNCOND, node) for node in inner):
        return "both"
    return "uncond" if any(mentions(_UNCOND, value) for value in values) else "cond"


def _switch_of_guidance(calls: Sequence[Found], statements: Sequence[Found]) -> ast.expr | None:
    """Find the flag under which predictions are guided in some way; `None` if they never are.

    Raises:
        UnreadableError: they are, and under no single flag.
    """
    loops = {id(found.loop) for found in calls}
    near = statements if any(found.loop is None for found in calls) else [f for f in statements if id(f.loop) in loops]
    flags = {
        ast.unparse(guard): guard
        for found in near
        for guard in found.guards
        if isinstance(guard, (ast.Name, ast.Attribute)) and mentions(_GUIDED, guard)
    }
    for found in near:
        decides = isinstance(found.statement, ast.Assign) and ast.unparse(found.statement.targets[0]) in flags
        is_under_one = any(guard in flags.values() for guard in found.guards)
        if mentions(_GUIDED, found.statement) and not decides and not is_under_one:
            raise UnreadableError("its predictions are guided, but not by uncond and cond calls or halves")
    if len(flags) > 1:
        raise UnreadableError(f"its predictions are guided in different ways ({', '.join(flags)})")
    return next(iter(flags.values()), None)


class _Split(NamedTuple):
    """Where a prediction is taken apart, `uncond, cond = prediction.chunk(2)`, and what its parts are."""

    found: Found
    names: list[str]
    labels: list[str]
    in_turn: bool = False

    def named(self, label: str) -> list[str]:
        """Return the names of the parts that have a label."""
        return [name for name, of in zip(self.names, self.labels, strict=True) if of == label]


def _named_splits(statements: Sequence[Found]) -> list[_Split]:
    splits = []
    for found, cut, names in _cuts(statements):
        labels = [_label(name) for name in names]
        if not {"uncond", "perturbed", "apart"} & {*labels} or any("emb" in name for name in names):
            continue
        conds, unconds = labels.count("cond"), labels.count("uncond")
        is_known = conds == unconds or (len(names) == 2 and (conds or "apart" in labels))
        if cut not in ("chunk", _IN_TURN) or not is_known or (conds > 1 and len(names) > conds + unconds):
            raise UnreadableError(f"its rows are [{', '.join(names)}]")
        splits.append(_Split(found, names, labels, cut == _IN_TURN))
    is_apart = any("uncond" in split.labels and "apart" in split.labels for split in splits)
    return [split for split in splits if is_apart or {"uncond", "perturbed"} & {*split.labels}]


def _label(name: str) -> str:
    return next((label for label, pattern in _LABELS.items() if pattern.search(name)), "cond")


def _cuts(statements: Sequence[Found]) -> Iterator[tuple[Found, str, list[str]]]:
    """Find where something is cut along its rows, by what function, and the names of its parts."""
    for found in statements:
        target = found.statement.targets[0] if isinstance(found.statement, ast.Assign) else None
        if not isinstance(target, ast.Tuple):
            continue
        if isinstance(found.value, ast.Tuple) and _takes_in_turn(found.value):
            yield found, _IN_TURN, [ast.unparse(one) for one in target.elts]
        if not isinstance(found.value, ast.Call):
            continue
        if tail(found.value.func) in _CUTS and _dim(found.value) == "0":
            names = [ast.unparse(one) for one in target.elts]
            yield found, "chunk" if _is_even(found.value, len(names)) else tail(found.value.func), names


def _takes_in_turn(value: ast.Tuple) -> bool:
    """Tell whether `x[::2], x[1::2]` takes every so many rows, all in turn."""
    parts = [(ast.unparse(part.value), part.slice) for part in value.elts if isinstance(part, ast.Subscript)]
    cuts = [(ast.unparse(cut.lower or _ZERO), ast.unparse(cut.step or _ZERO)) for _, cut in parts if _has_start(cut)]
    count = len(value.elts)
    return len({of for of, _ in parts}) == 1 and cuts == [(str(i), str(count)) for i in range(count)]


def _has_start(cut: ast.expr) -> TypeGuard[ast.Slice]:
    return isinstance(cut, ast.Slice) and cut.upper is None


def _is_even(call: ast.Call, count: int) -> bool:
    """Tell whether `torch.split(x, len(x) // 2)` cuts into so many equal parts."""
    size = call.args[-1] if tail(call.func) == "split" and call.args else None
    if not isinstance(size, ast.BinOp) or not isinstance(size.op, ast.FloorDiv):
        return False
    return isinstance(size.right, ast.Constant) and size.right.value == count


def takes_apart(statements: Sequence[Found]) -> bool:
    """Tell whether something is taken apart there, into parts whose names say what they are."""
    names = (name for _, _, names in _cuts(statements) for name in names)
    return any(_label(name) in ("uncond", "perturbed") and "emb" not in name for name in names)


def _by_weights(
    calls: Sequence[Found], kinds: list[str], statements: Sequence[Found]
) -> tuple[list[_Split], list[str]]:
    """Find what can be cond and uncond, as it is combined: two halves or, if there are none, two calls."""
    halves = [(found, names) for found, cut, names in _cuts(statements) if cut == "chunk" and len(names) == 2]
    splits = [_Split(found, names, ["uncond", "cond"]) for found, names in halves]
    splits = [split for split in splits if combination_of((split.found,), split.names[::-1], statements, False)]
    pair = [found for kind, found in zip(kinds, calls, strict=True) if kind == "cond"]
    if splits or len(pair) != 2 or combination_of(pair, [pair[0].target, pair[1].target], statements, False) is None:
        return splits, kinds
    return [], ["uncond" if found is pair[1] else kind for kind, found in zip(kinds, calls, strict=True)]


def _is_else_of(call: Found, calls: Sequence[Found]) -> bool:
    """Tell whether a call is made instead of others: it stands in the `else` of one, or is returned at once."""
    if isinstance(call.statement, ast.Return):
        return True
    negated = {ast.unparse(guard.operand) for guard in call.guards if isinstance(guard, ast.UnaryOp)}
    return any(ast.unparse(guard) in negated for other in calls for guard in other.guards)


def _row_splits(
    call: Found, calls: Sequence[Found], splits: Sequence[_Split], statements: Sequence[Found], is_named: bool
) -> Iterator[RowSplit]:
    """Find where the prediction of a call is taken apart: after it, and before the next one of that name is made."""
    own = [split for split in splits if _made_by(split, calls) is call]
    if not own and _is_else_of(call, calls):
        yield RowSplit("cond", (), ())
    elif not own:
        raise UnreadableError("it makes a call for cond and uncond, and does not say which half is which")
    for split in own:
        conds, unconds = split.named("cond"), split.named("uncond")
        # Where they come from calls of their own, the other half of each is not used.
        elsewhere = [other for other in splits if other.found.guards == split.found.guards and other is not split]
        follows = bool(conds) and "apart" in split.labels
        if "apart" in split.labels:
            conds = conds or [name for other in elsewhere for name in other.named("cond")]
            unconds = unconds or [name for other in elsewhere for name in other.named("uncond")]
        if not conds or len(unconds) > len(conds):
            raise UnreadableError(f"its rows are [{', '.join(split.names)}]")
        others = [*split.named("perturbed"), *split.named("image")]
        groups = (
            [[cond, *uncond, *others] for cond, *uncond in itertools.zip_longest(conds, unconds)] if unconds else []
        )
        found = (combination_of((call, split.found), group, statements, is_named) for group in groups)
        combinations = tuple(one for one in found if one is not None)
        whole = next((name for name in call.targets if name in {*names_in(split.found.value or call.statement)}), "")
        rows = "+".join(split.labels)
        yield RowSplit(rows, split.found.guards, combinations, follows, is_named, whole, split.in_turn)


def _made_by(split: _Split, calls: Sequence[Found]) -> Found | None:
    """Return the last call before a split that made what it takes apart, by its name if one has that."""
    line, names = split.found.statement.lineno, {*names_in(split.found.value or split.found.statement)}
    before = [call for call in calls if call.statement.lineno <= line]
    return next(reversed([call for call in before if call.target in names] or before), None)


def _sliced(call: Found, statements: Sequence[Found]) -> CallSite | None:
    """Understand `cond = outputs[:n]` and `uncond = outputs[n:]`, combined sample by sample; `None` if it is not so."""
    parts, whole = {}, call.target
    for found in statements:
        value = found.value
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice) and tail(value.value) == whole:
            parts[found.target] = (found.guards, value.slice)
    if len(parts) != 2:
        return None
    (cond, uncond), ((guards, first), (others, second)) = parts, parts.values()
    is_cut = first.upper is not None and second.lower is not None and ast.dump(first.upper) == ast.dump(second.lower)
    if not is_cut or first.lower or second.upper or first.step or second.step or guards != others:
        return None
    if _UNCOND.search(cond) or not _UNCOND.search(uncond):
        return None
    made_of = [(found.target, set(names_in(found.statement))) for found in statements]
    one, other = (next((x for x, names in made_of if x not in ("", name) and name in names), "") for name in parts)
    combination = combination_of((call,), [one, other], statements)
    return None if combination is None else CallSite(call.lines, "samples", guards=guards, combination=combination)


def channels_of(statements: Sequence[Found]) -> ast.expr | None:
    """Find where a variance is split off, `prediction, variance = prediction.split(channels, dim=1)`: the channels."""
    calls = (found.value for found in statements if isinstance(found.value, ast.Call))
    splits = (call for call in calls if tail(call.func) == "split" and len(call.args) == 1 and _dim(call) == "1")
    return next((call.args[0] for call in splits), None)


def _dim(call: ast.Call) -> str:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == "dim"), "0")
