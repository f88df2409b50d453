"""Read, in a pipeline's own code, what each call of its denoiser is for.

A pipeline says it in three ways: by the name of a `cache_context("cond")` around the call, by what it passes
(`negative_prompt_embeds`), and by how it takes the result apart (`uncond, cond = prediction.chunk(2)`). The conditions
under which it does so, and the weight with which it combines the predictions, stand there as well; they are evaluated
in the running pipeline, so that guidance follows whatever it decides in a step.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from stg_hooks.integrations.expressions import evaluate

_UNCOND = re.compile(r"(^|_)(neg|negative|uncond|unconditional|null)(_|$)")
_GUIDED = re.compile(r"(^|_)(uncond|unconditional|cfg|classifier_free)(_|$)")
# Names of cache contexts, and of the guiders' batches.
_NAMES = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond", "cond_uncond": "both"}

Guards: TypeAlias = "tuple[ast.expr, ...]"


class UnreadableError(Exception):
    """A function's calls of its denoiser do not follow any known pattern; the message says which calls."""


@dataclasses.dataclass(frozen=True)
class _Found:
    """A statement, with the conditions under which it runs, the cache context and the outermost loop that it is in."""

    statement: ast.stmt
    guards: Guards
    context: ast.expr | None
    loop: ast.stmt | None


@dataclasses.dataclass(frozen=True)
class Site:
    """A call of a denoiser in a function's code.

    `kind` says what it is for: `"cond"`, `"uncond"`, `"both"` (rows `[uncond, cond]`, while `guards` hold),
    `"samples"` (a list of samples, the first half of them cond and the second half uncond, while `guards` hold),
    `"perturbed"` (a weak prediction of the pipeline's own), or `"unused"`. Where the code names it at run time,
    `context` is that name. For a cond call, `guards` are the conditions under which the uncond call follows; `None` if
    none does. While `unless` holds, the prediction is guided in some way that is not understood. `channels` is how many
    channels of the prediction are guided, where the others predict a variance.
    """

    lines: range
    kind: str
    context: ast.expr | None = None
    guards: Guards | None = None
    combination: _Combination | None = None
    unless: ast.expr | None = None
    channels: ast.expr | None = None

    def kind_now(self, names: Mapping[str, Any]) -> str:
        """Return what the call is for in the running function, whose variables are given."""
        return self.kind if self.context is None else _NAMES.get(str(evaluate(self.context, names)), "perturbed")


@dataclasses.dataclass(frozen=True)
class _Combination:
    """The expression that combines both predictions, and the assignments that may change its weight before it."""

    expression: ast.expr
    cond: str
    uncond: str
    guards: Guards
    changes: tuple[Guards, ...]

    def weight(self, names: Mapping[str, Any], sums: dict[int, float]) -> Any:
        """Return `g` of `uncond + g * (cond - uncond)`, or `None` if it is not known yet.

        Args:
            names: the variables of the running function.
            sums: keeps what the weights sum to. Of tensors that is looked at once only, as it waits for the GPU; what
                they sum to is a matter of the expression.

        Raises:
            UnreadableError: the running function combines them in another way.
        """
        try:
            other = next((guard for guard in self.guards if not evaluate(guard, names)), None)
            if other is not None:
                raise UnreadableError(f"it combines its predictions in another way, as {ast.unparse(other)} is false")
            if any(holds(guards, names) for guards in self.changes):
                return None
            g = evaluate(self.expression, {**names, self.cond: 1.0, self.uncond: 0.0})
            total = g + evaluate(self.expression, {**names, self.cond: 0.0, self.uncond: 1.0})
        except (LookupError, TypeError):
            return None
        found = sums.get(id(self)) if hasattr(total, "max") else None
        if found is None:
            found = next((value for value in (1.0, 0.0) if _is_near(total, value)), None)
            if found is None:
                raise UnreadableError(f"the weights in {ast.unparse(self.expression)} do not sum to one")
            sums[id(self)] = found
        return g if found else None  # 0: a difference, which is added to something


def _is_near(value: Any, wanted: float) -> bool:
    error = abs(value - wanted)
    return float(error.max() if hasattr(error, "max") else error) < 1e-4


def call_sites_of(cls: type, base: type, denoisers: tuple[str, ...]) -> dict[CodeType, tuple[Site, ...]]:
    """Find the calls of its denoisers in all methods of a pipeline class, in what it overrides as well.

    Args:
        cls: the class.
        base: where its own methods end.
        denoisers: the attributes of `self` that are denoisers.

    Returns:
        The calls of each method's code that makes any.

    Raises:
        UnreadableError, OSError: as for `call_sites`.
    """
    read = {function.__code__: call_sites(function.__code__, denoisers) for function in _functions(cls, base)}
    if {"both", "cond"} <= {site.kind for sites in read.values() for site in sites}:
        raise UnreadableError("some calls are for [uncond, cond], and others for cond alone")
    return {code: sites for code, sites in read.items() if sites}


def _functions(cls: type, base: type) -> Iterator[FunctionType]:
    for owner in itertools.takewhile(lambda owner: owner is not base, cls.__mro__):
        for value in vars(owner).values():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType):
                yield function


def holds(guards: Guards, names: Mapping[str, Any]) -> bool:
    """Return whether all conditions are true in a running function."""
    return all(bool(evaluate(guard, names)) for guard in guards)


@functools.lru_cache(maxsize=256)
def call_sites(code: CodeType, denoisers: tuple[str, ...]) -> tuple[Site, ...]:
    """Find a function's calls of a denoiser, and what they are for.

    Args:
        code: the function's code.
        denoisers: the attributes of `self` that are denoisers.

    Returns:
        Its calls; none if it makes none.

    Raises:
        UnreadableError: it calls a denoiser, but for what cannot be told.
        OSError: its source is not there.
    """
    if not set(denoisers) & set(code.co_names):
        return ()
    lines, first = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    ast.increment_lineno(tree, first - 1)
    statements = list(_statements(getattr(tree, "body", []), (), None, None))
    callees = _callees(statements, denoisers)
    calls = [(found, call) for found in statements for call in _calls(found.statement, callees)]
    channels = _channels(statements)
    return tuple(dataclasses.replace(site, channels=channels) for site in _classified(calls, statements))


def _statements(
    body: Sequence[ast.stmt], guards: Guards, context: ast.expr | None, loop: ast.stmt | None
) -> Iterator[_Found]:
    """Yield the simple statements of a function, but not those of functions inside it."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.body, (*guards, statement.test), context, loop)
            negated = ast.UnaryOp(ast.Not(), statement.test)
            yield from _statements(statement.orelse, (*guards, negated), context, loop)
        elif isinstance(statement, ast.With):
            names = [item.context_expr for item in statement.items]
            named = [
                n.args[0] for n in names if isinstance(n, ast.Call) and n.args and _tail(n.func) == "cache_context"
            ]
            yield from _statements(statement.body, guards, named[0] if named else context, loop)
        elif isinstance(statement, (ast.For, ast.While)):
            yield from _statements([*statement.body, *statement.orelse], guards, context, loop or statement)
        elif isinstance(statement, ast.Try):
            parts = [*statement.body, *(s for handler in statement.handlers for s in handler.body)]
            yield from _statements([*parts, *statement.orelse, *statement.finalbody], guards, context, loop)
        elif not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield _Found(statement, guards, context, loop)


def _callees(statements: Sequence[_Found], denoisers: tuple[str, ...]) -> set[str]:
    """Return what denoisers are called in the code: `self.transformer`, and names that it is assigned to."""
    attributes = {f"self.{name}" for name in denoisers}
    aliases = {
        target.id
        for found in statements
        if isinstance(found.statement, ast.Assign) and _is_reference(found.statement.value, attributes)
        for target in found.statement.targets
        if isinstance(target, ast.Name)
    }
    return attributes | aliases


def _is_reference(value: ast.expr, attributes: set[str]) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_reference(value.body, attributes) or _is_reference(value.orelse, attributes)
    return ast.unparse(value) in attributes


def _calls(statement: ast.stmt, callees: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in callees:
            yield node


def _classified(calls: Sequence[tuple[_Found, ast.Call]], statements: Sequence[_Found]) -> Iterator[Site]:
    kinds = [_kind(found, call) for found, call in calls]
    splits = _splits(statements)
    unless = None
    sliced = None if splits or len(calls) != 1 or kinds != ["cond"] else _sliced(calls[0][0], statements)
    if sliced is not None:
        yield sliced
        return
    if not splits and "uncond" not in kinds and "named" not in kinds:
        unless = _switch_of_guidance([found for found, _ in calls], statements)
    unnamed = [kind for kind, (found, _) in zip(kinds, calls, strict=True) if found.context is None]
    unnamed = [kind for kind in unnamed if kind not in ("perturbed", "unused")]
    if "uncond" in unnamed and sorted(unnamed) != ["cond", "uncond"]:
        raise UnreadableError(f"it makes {len(unnamed)} different calls, not one for cond and one for uncond")
    uncond = next((found for kind, (found, _) in zip(kinds, calls, strict=True) if kind == "uncond"), None)
    if splits and uncond is None:
        kinds = ["both" if kind == "cond" else kind for kind in kinds]
    boths = [found for kind, (found, _) in zip(kinds, calls, strict=True) if kind == "both"]
    for kind, (found, _) in zip(kinds, calls, strict=True):
        lines = _lines(found)
        if kind == "named":
            yield Site(lines, "perturbed", found.context)
        elif kind == "both":
            halves, cond_name, uncond_name = _split_of(found, boths, splits)
            combination = _combination(found, cond_name, uncond_name, statements)
            yield Site(lines, "both", None, halves.guards, combination)
        elif kind == "cond" and uncond is not None:
            guards = tuple(guard for guard in uncond.guards if guard not in found.guards)
            yield Site(lines, kind, None, guards, _combination(found, _target(found), _target(uncond), statements))
        elif kind == "uncond":
            cond = next(f for k, (f, _) in zip(kinds, calls, strict=True) if k == "cond")
            yield Site(lines, kind, None, None, _combination(found, _target(cond), _target(found), statements))
        else:
            yield Site(lines, kind, unless=unless)


def _lines(found: _Found) -> range:
    return range(found.statement.lineno, (found.statement.end_lineno or found.statement.lineno) + 1)


def _kind(found: _Found, call: ast.Call) -> str:
    """Return what one call is for, by its name or else by what is passed to it."""
    if isinstance(found.context, ast.Constant):
        return _NAMES.get(str(found.context.value), "perturbed")
    if found.context is not None:
        return "named"
    if isinstance(found.statement, ast.Expr):
        raise UnreadableError("it looks into its denoiser after a call, and would find what the weak pass left there")
    if _target(found) == "_":
        return "unused"
    if any(keyword.arg == "skip_layers" for keyword in call.keywords):
        return "perturbed"
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(_tail(node.func) in ("cat", "concat", "stack") and _names_uncond(node) for node in _inner_calls(values)):
        return "both"
    return "uncond" if any(map(_names_uncond, values)) else "cond"


def _inner_calls(values: Sequence[ast.expr]) -> Iterator[ast.Call]:
    return (node for value in values for node in ast.walk(value) if isinstance(node, ast.Call))


def _names(node: ast.AST) -> Iterator[str]:
    return (name for inner in ast.walk(node) if (name := _tail(inner)))


def _names_uncond(node: ast.AST) -> bool:
    return any(_UNCOND.search(name) for name in _names(node))


def _mentions_guidance(node: ast.AST) -> bool:
    return any(_GUIDED.search(name) for name in _names(node))


def _switch_of_guidance(calls: Sequence[_Found], statements: Sequence[_Found]) -> ast.expr | None:
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


_Split: TypeAlias = "tuple[_Found, str, str]"


def _splits(statements: Sequence[_Found]) -> list[_Split]:
    """Find where predictions are taken apart, `uncond, cond = prediction.chunk(2)`, and both names."""
    result = []
    for found in statements:
        statement = found.statement
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
            continue
        call, targets = statement.value, statement.targets[0]
        if _tail(call.func) != "chunk" or not isinstance(targets, ast.Tuple):
            continue
        names = [target.id for target in targets.elts if isinstance(target, ast.Name)]
        unconds = [bool(_UNCOND.search(name)) for name in names]
        if not any(unconds) or any("emb" in name for name in names):
            continue
        if unconds != [True, False] or "_" in names:
            raise UnreadableError(f"its rows are [{', '.join(names)}]")
        result.append((found, names[1], names[0]))
    return result


def _split_of(call: _Found, calls: Sequence[_Found], splits: Sequence[_Split]) -> _Split:
    """Find where the prediction of a call is taken apart: after it, and before the next one is made."""
    line = call.statement.lineno
    following = [other.statement.lineno for other in calls if other.statement.lineno > line]
    for split in splits:
        if line < split[0].statement.lineno < min(following, default=sys.maxsize):
            return split
    raise UnreadableError("it makes a call for cond and uncond, and does not say which half is which")


def _sliced(call: _Found, statements: Sequence[_Found]) -> Site | None:
    """Understand `cond, uncond = outputs[:n], outputs[n:]`, combined sample by sample; `None` if it is not so."""
    parts, whole = {}, _target(call)
    for found in statements:
        value = found.statement.value if isinstance(found.statement, ast.Assign) else None
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice) and _tail(value.value) == whole:
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
    if not any(_tail(node.func) == "stack" and whole in _names(node) for node in _inner_calls(list(assigned))):
        return None  # it may be a tensor
    made_of = [(_target(found), set(_names(found.statement))) for found in statements]
    one, other = (next((x for x, names in made_of if x not in ("", name) and name in names), "") for name in parts)
    combination = _combination(call, one, other, statements)
    return None if combination is None else Site(_lines(call), "samples", None, guards, combination)


def _channels(statements: Sequence[_Found]) -> ast.expr | None:
    """Find where a variance is split off, `prediction, variance = prediction.split(channels, dim=1)`: the channels."""
    for found in statements:
        value = found.statement.value if isinstance(found.statement, ast.Assign) else None
        if not (isinstance(value, ast.Call) and _tail(value.func) == "split" and len(value.args) == 1):
            continue
        if any(word.arg == "dim" and ast.unparse(word.value) == "1" for word in value.keywords):
            return value.args[0]
    return None


def _target(found: _Found) -> str:
    """Return the name that a call's result is given."""
    statement = found.statement
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if isinstance(target, (ast.Tuple, ast.List)):
        target = target.elts[0]
    return target.id if isinstance(target, ast.Name) else ""


def _combination(call: _Found, cond: str, uncond: str, statements: Sequence[_Found]) -> _Combination | None:
    """Find the expression that combines both predictions after a call."""
    later = [found for found in statements if found.statement.lineno > call.statement.lineno]
    for place, found in enumerate(later):
        value = found.statement.value if isinstance(found.statement, (ast.Assign, ast.Return)) else None
        if isinstance(value, ast.BinOp) and {cond, uncond} <= set(_names(value)):
            weights = {name.lstrip("_") for name in _names(value)} - {cond, uncond, "self"}
            changes = tuple(
                other.guards
                for other in later[:place]
                if isinstance(other.statement, ast.Assign)
                and {name.lstrip("_") for target in other.statement.targets for name in _names(target)} & weights
            )
            return _Combination(value, cond, uncond, found.guards, changes)
    return None


def _tail(node: ast.AST) -> str:
    """Return the last part of a dotted name; nothing for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
