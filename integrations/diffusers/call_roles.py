"""Tell what the calls of a denoiser in a function are for: by names, and by how their predictions are combined."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from stg_hooks.integrations.diffusers.call_sites import KINDS, Combination, Guards, Site, UnreadableError
from stg_hooks.integrations.diffusers.formulas import formulas, tail
from stg_hooks.integrations.diffusers.predictions import Flow, Value, doubles

_UNCOND = re.compile(r"(^|_)(neg|negative|uncond|unconditional|null)(_|$)")
_GUIDED = re.compile(r"(^|_)(uncond|unconditional|cfg|classifier_free)(_|$)")


@dataclasses.dataclass(frozen=True)
class Found:
    """A statement, with the conditions under which it runs, the cache context and the outermost loop that it is in."""

    statement: ast.stmt
    guards: Guards
    context: ast.expr | None
    loop: ast.stmt | None


def classified(calls: Sequence[tuple[Found, ast.Call]], statements: Sequence[Found], flow: Flow) -> Iterator[Site]:
    """Tell what each call is for.

    Args:
        calls: the calls, each with the statement that it is in.
        statements: all statements of the function.
        flow: what becomes of its predictions.

    Raises:
        UnreadableError: it cannot be told.
    """
    kinds = [_kind(found, call) for found, call in calls]
    splits = _splits(statements)
    unless = None
    sliced = None if splits or len(calls) != 1 or kinds != ["cond"] else _sliced(calls[0][0], statements)
    if sliced is not None:
        yield sliced
        return
    is_named = bool(splits) or not set(kinds) <= {"cond", "unused", "perturbed"}
    if not is_named:
        splits = _cut_as_combined(statements, flow)
        kinds = kinds if splits else _combined_with(calls, kinds, flow)
    if not splits and "uncond" not in kinds and "named" not in kinds:
        unless = _switch_of_guidance([found for found, _ in calls], statements)
        if not is_named:
            _check_unguided(calls, kinds, statements, flow, "" if unless is None else ast.unparse(unless))
    unnamed = [kind for kind, (found, _) in zip(kinds, calls, strict=True) if found.context is None]
    unnamed = [kind for kind in unnamed if kind not in ("perturbed", "unused")]
    if "uncond" in unnamed and sorted(unnamed) != ["cond", "uncond"]:
        raise UnreadableError(f"it makes {len(unnamed)} different calls, not one for cond and one for uncond")
    uncond = next((found for kind, (found, _) in zip(kinds, calls, strict=True) if kind == "uncond"), None)
    if uncond is not None and uncond.statement.lineno < calls[kinds.index("cond")][0].statement.lineno:
        raise UnreadableError("it calls its denoiser for uncond first, before the cond prediction is known")
    if splits and uncond is None:
        kinds = ["both" if kind == "cond" else kind for kind in kinds]
    boths = [found for kind, (found, _) in zip(kinds, calls, strict=True) if kind == "both"]
    for kind, (found, _) in zip(kinds, calls, strict=True):
        lines = _lines(found)
        if kind == "named":
            yield Site(lines, "perturbed", found.context)
        elif kind == "both":
            halves, cond_name, uncond_name = _split_of(found, boths, splits)
            combination = _combination(found, cond_name, uncond_name, statements, is_named)
            yield Site(lines, "both", None, halves.guards, combination)
        elif kind == "cond" and uncond is not None:
            guards = tuple(guard for guard in uncond.guards if guard not in found.guards)
            combination = _combination(found, _target(found), _target(uncond), statements, is_named)
            yield Site(lines, kind, None, guards, combination)
        elif kind == "uncond":
            cond = next(f for k, (f, _) in zip(kinds, calls, strict=True) if k == "cond")
            combination = _combination(found, _target(cond), _target(found), statements, is_named)
            yield Site(lines, kind, None, None, combination)
        else:
            yield Site(lines, kind, unless=unless)


def _lines(found: Found) -> range:
    return range(found.statement.lineno, (found.statement.end_lineno or found.statement.lineno) + 1)


def _kind(found: Found, call: ast.Call) -> str:
    """Return what one call is for, by its name or else by what is passed to it."""
    if isinstance(found.context, ast.Constant):
        return KINDS.get(str(found.context.value), "perturbed")
    if found.context is not None:
        return "named"
    if isinstance(found.statement, ast.Expr):
        raise UnreadableError("it looks into its denoiser after a call, and would find what the weak pass left there")
    if _target(found) == "_":
        return "unused"
    if any(keyword.arg == "skip_layers" for keyword in call.keywords):
        return "perturbed"
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(tail(node.func) in ("cat", "concat", "stack") and _names_uncond(node) for node in _inner_calls(values)):
        return "both"
    return "uncond" if any(map(_names_uncond, values)) else "cond"


def _inner_calls(values: Sequence[ast.expr]) -> Iterator[ast.Call]:
    return (node for value in values for node in ast.walk(value) if isinstance(node, ast.Call))


def _names(node: ast.AST) -> Iterator[str]:
    return (name for inner in ast.walk(node) if (name := tail(inner)))


def _names_uncond(node: ast.AST) -> bool:
    return any(_UNCOND.search(name) for name in _names(node))


def _mentions_guidance(node: ast.AST) -> bool:
    return any(_GUIDED.search(name) for name in _names(node))


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
        if isinstance(guard, (ast.Name, ast.Attribute)) and _mentions_guidance(guard)
    }
    for found in near:
        decides = isinstance(found.statement, ast.Assign) and ast.unparse(found.statement.targets[0]) in flags
        if _mentions_guidance(found.statement) and not decides and not any(f in flags.values() for f in found.guards):
            raise UnreadableError("its predictions are guided, but not by uncond and cond calls or halves")
    if len(flags) > 1:
        raise UnreadableError(f"its predictions are guided in different ways ({', '.join(flags)})")
    return next(iter(flags.values()), None)


_Split: TypeAlias = "tuple[Found, str, str]"


def _splits(statements: Sequence[Found]) -> list[_Split]:
    """Find where predictions are taken apart, `uncond, cond = prediction.chunk(2)`, and both names."""
    result = []
    for found in statements:
        statement = found.statement
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
            continue
        call, targets = statement.value, statement.targets[0]
        if tail(call.func) != "chunk" or not isinstance(targets, ast.Tuple):
            continue
        names = [target.id for target in targets.elts if isinstance(target, ast.Name)]
        unconds = [bool(_UNCOND.search(name)) for name in names]
        if not any(unconds) or any("emb" in name for name in names):
            continue
        if unconds != [True, False] or "_" in names:
            raise UnreadableError(f"its rows are [{', '.join(names)}]")
        result.append((found, names[1], names[0]))
    return result


def _cut_as_combined(statements: Sequence[Found], flow: Flow) -> list[_Split]:
    """Find where predictions are taken apart, `b, a = prediction.chunk(2)`, and combined: `b + weight * (a - b)`."""
    result = []
    for found in statements:
        statement = found.statement
        if not flow.cut.get(id(statement)):
            continue
        assert isinstance(statement, ast.Assign)
        target = statement.targets[0]
        rows = [ast.unparse(one) for one in target.elts] if isinstance(target, (ast.Tuple, ast.List)) else []
        guided = [one for one in flow.guided if {one.formula.cond, one.formula.uncond} == set(rows)]
        read = {(_part(one.uncond), _part(one.cond)) if one.formula.is_evident else None for one in guided}
        is_half = isinstance(statement.value, ast.Call) and tail(statement.value.func) == "chunk" and len(rows) == 2
        if read == {("[1]", "[0]")}:
            raise UnreadableError(f"its rows are [{', '.join(rows)}], and {rows[0]} is used as cond")
        if not is_half or read != {("[0]", "[1]")}:
            raise UnreadableError(f"it takes a prediction apart as [{', '.join(rows)}], and which is cond is not clear")
        result.append((found, rows[1], rows[0]))
    return result


def _part(value: Value) -> str | None:
    """Return which part of one prediction a value is; `None` if it is made of several."""
    return next(iter(value))[1] if len(value) == 1 else None


def _combined_with(calls: Sequence[tuple[Found, ast.Call]], kinds: list[str], flow: Flow) -> list[str]:
    """Return what two calls are for, where their predictions are combined: `b + weight * (a - b)`."""
    read = set()
    for guided in flow.guided:
        found = tuple(_place(calls, flow, value) for value in (guided.cond, guided.uncond))
        names = [_target(calls[place][0]) for place in found if place is not None]
        is_clear = names == [guided.formula.cond, guided.formula.uncond] and guided.formula.is_evident
        read.add(found if is_clear else None)
    if len(read) != 1 or kinds.count("cond") != 2:
        return kinds
    (roles,) = read
    if roles is None or roles[0] == roles[1]:
        return kinds
    return ["uncond" if place == roles[1] else kind for place, kind in enumerate(kinds)]


def _place(calls: Sequence[tuple[Found, ast.Call]], flow: Flow, value: Value) -> int | None:
    """Return which call a whole prediction is of; `None` if it is not of exactly one."""
    (which, part), *others = value
    made = [place for place, (_, call) in enumerate(calls) if call is flow.calls[which]]
    return made[0] if made and not others and not part else None


def _check_unguided(
    calls: Sequence[tuple[Found, ast.Call]],
    kinds: Sequence[str],
    statements: Sequence[Found],
    flow: Flow,
    unless: str,
) -> None:
    """Raise where predictions that are not known to be uncond and cond are combined, or seem to be, but for a flag."""
    if unless:
        flow = Flow(flow.body, flow.callees, flow.helper, unless)
        statements = [found for found in statements if unless not in map(ast.unparse, found.guards)]
    if flow.hands_on_both:
        raise UnreadableError("it makes several predictions side by side, and which are cond is not clear")
    if flow.conflicts and "perturbed" not in kinds:
        raise UnreadableError(f"it combines predictions, and which are cond is not clear: {_short(flow.conflicts[0])}")
    values = {_target(found): found.statement for found in statements}
    for found, call in calls:
        used = [call, *(values[name] for name in set(_names(call)) - {_target(found)} if name and name in values)]
        if any(map(doubles, used)):
            raise UnreadableError("it predicts the same latents twice in a call, and which rows are cond is not clear")


def _short(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) < 80 else f"{text[:77]}..."


def _split_of(call: Found, calls: Sequence[Found], splits: Sequence[_Split]) -> _Split:
    """Find where the prediction of a call is taken apart: after it, and before the next one is made."""
    line = call.statement.lineno
    following = [other.statement.lineno for other in calls if other.statement.lineno > line]
    for split in splits:
        if line <= split[0].statement.lineno < min(following, default=sys.maxsize):
            return split
    raise UnreadableError("it makes a call for cond and uncond, and does not say which half is which")


def _sliced(call: Found, statements: Sequence[Found]) -> Site | None:
    """Understand `cond, uncond = outputs[:n], outputs[n:]`, combined sample by sample; `None` if it is not so."""
    parts, whole = {}, _target(call)
    for found in statements:
        value = found.statement.value if isinstance(found.statement, ast.Assign) else None
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice) and tail(value.value) == whole:
            parts[_target(found)] = (found.guards, value.slice)
    if len(parts) != 2:
        return None
    (cond, uncond), ((guards, first), (others, second)) = parts, parts.values()
    is_cut = first.upper is not None and second.lower is not None and ast.dump(first.upper) == ast.dump(second.lower)
    if not is_cut or first.lower or second.upper or first.step or second.step or guards != others:
        return None
    if _UNCOND.search(cond) or not _UNCOND.search(uncond):
        return None
    assigned = (found.statement.value for found in statements if isinstance(found.statement, ast.Assign))
    if not any(tail(node.func) == "stack" and whole in _names(node) for node in _inner_calls(list(assigned))):
        return None  # it may be a tensor
    made_of = [(_target(found), set(_names(found.statement))) for found in statements]
    one, other = (next((x for x, names in made_of if x not in ("", name) and name in names), "") for name in parts)
    combination = _combination(call, one, other, statements)
    return None if combination is None else Site(_lines(call), "samples", None, guards, combination)


def channels_of(statements: Sequence[Found]) -> ast.expr | None:
    """Find where a variance is split off, `prediction, variance = prediction.split(channels, dim=1)`: the channels."""
    for found in statements:
        value = found.statement.value if isinstance(found.statement, ast.Assign) else None
        if not (isinstance(value, ast.Call) and tail(value.func) == "split" and len(value.args) == 1):
            continue
        if any(word.arg == "dim" and ast.unparse(word.value) == "1" for word in value.keywords):
            return value.args[0]
    return None


def _target(found: Found) -> str:
    """Return the name that a call's result is given."""
    statement = found.statement
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if isinstance(target, (ast.Tuple, ast.List)):
        target = target.elts[0]
    return target.id if isinstance(target, ast.Name) else ""


def _combination(
    call: Found, cond: str, uncond: str, statements: Sequence[Found], is_named: bool = True
) -> Combination | None:
    """Find the expression that combines both predictions after a call."""
    later = [found for found in statements if found.statement.lineno > call.statement.lineno]
    for place, found in enumerate(later):
        value = getattr(found.statement, "value", None)
        if not isinstance(value, ast.expr) or not {cond, uncond} <= set(_names(value)):
            continue
        formula = next((one for one in formulas(value) if {one.cond, one.uncond} == {cond, uncond}), None)
        if formula is not None and formula.is_evident and formula.cond != cond:
            raise UnreadableError(f"it calls {uncond} what it uses as cond: {_short(formula.node)}")
        expression = value if formula is None else formula.node
        if isinstance(expression, ast.BinOp):
            weights = {name.lstrip("_") for name in _names(expression)} - {cond, uncond, "self"}
            changes = tuple(
                other.guards
                for other in later[:place]
                if isinstance(other.statement, ast.Assign)
                and {name.lstrip("_") for target in other.statement.targets for name in _names(target)} & weights
            )
            return Combination(expression, cond, uncond, found.guards, changes, is_named)
    return None
