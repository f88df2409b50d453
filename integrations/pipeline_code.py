"""Read, in a pipeline's own code, what each call of its denoiser is for.

A pipeline says it in four ways: by the name of a `cache_context("cond")` around the call, by what it passes
(`negative_prompt_embeds`), by how it takes the result apart (`uncond, cond = prediction.chunk(2)`), and by how it
combines what it has, whatever the names: `b + weight * (a - b)`. The conditions under which it does so, and the weight,
stand there as well; they are evaluated in the running pipeline, so that guidance follows whatever it decides in a step.

Predictions that are combined in a way that is not understood are refused: they are not taken for cond ones.
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
from typing import Any, TypeAlias, TypeGuard

from stg_hooks.integrations.expressions import evaluate
from stg_hooks.integrations.predictions import Flow, Helper, Plain, Value, doubles, formulas
from stg_hooks.integrations.predictions import tail as _tail

_UNCOND = re.compile(r"(^|_)(neg|negative|uncond|unconditional|null)(_|$)")
_GUIDED = re.compile(r"(^|_)(uncond|unconditional|cfg|classifier_free)(_|$)")
# Names of cache contexts, and of the guiders' batches.
_NAMES = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond", "cond_uncond": "both"}

_COMPOUND = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Match, ast.AsyncFor, ast.AsyncWith)

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
    is_named: bool = True

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
        if not self.is_named and isinstance(g, (int, float)) and g < 0:
            raise UnreadableError(f"{ast.unparse(self.expression)} has a negative weight: which is cond is not clear")
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
    return dict(_read_together(tuple(_functions(cls, base)), denoisers))


def _functions(cls: type, base: type) -> Iterator[FunctionType]:
    for owner in itertools.takewhile(lambda owner: owner is not base, cls.__mro__):
        for value in vars(owner).values():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType):
                yield function


@functools.lru_cache(maxsize=64)
def _read_together(functions: tuple[FunctionType, ...], denoisers: tuple[str, ...]) -> dict[CodeType, tuple[Site, ...]]:
    methods = {function.__name__: function for function in reversed(functions)}
    alone = [_read(function, methods, denoisers) for function in functions]
    readings, names = alone, _that_return_predictions(alone)
    wrappers: set[str] = set()
    while names - wrappers:
        wrappers |= names
        readings = [_read(function, methods, (*denoisers, *sorted(wrappers))) for function in functions]
        names = _that_return_predictions(readings)
    # What only hands a prediction on is as its callers are, if these say more than it does.
    if all(reading.is_plain for reading in readings if reading.called & wrappers):
        readings = alone
    else:
        readings = [reading for reading in readings if reading.function.__name__ not in wrappers]
    read = {reading.function.__code__: reading.sites for reading in readings if reading.sites}
    if {"both", "cond"} <= {site.kind for sites in read.values() for site in sites}:
        raise UnreadableError("some calls are for [uncond, cond], and others for cond alone")
    return read


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What has been read in a function: its calls, by what names it makes them, and whether it hands them on."""

    function: FunctionType
    sites: tuple[Site, ...] = ()
    called: frozenset[str] = frozenset()
    hands_on: bool = False

    @property
    def is_plain(self) -> bool:
        return all(site.kind in ("cond", "unused") and site.guards is None for site in self.sites)


def _that_return_predictions(readings: Sequence[_Reading]) -> set[str]:
    return {reading.function.__name__ for reading in readings if reading.hands_on and reading.is_plain}


def holds(guards: Guards, names: Mapping[str, Any]) -> bool:
    """Return whether all conditions are true in a running function."""
    return all(bool(evaluate(guard, names)) for guard in guards)


def _read(function: FunctionType, methods: Mapping[str, FunctionType], denoisers: tuple[str, ...]) -> _Reading:
    """Find a function's calls of a denoiser, and what they are for.

    Raises:
        UnreadableError: it calls a denoiser, but for what cannot be told.
        OSError: its source is not there.
    """
    if not set(denoisers) & set(_names_in(function.__code__)):
        return _Reading(function)
    tree = _tree(function.__code__)
    body = getattr(tree, "body", [])
    statements = list(_statements(body, (), None, None))
    callees = _callees(statements, denoisers)
    calls = [(found, call) for found in statements for call in _calls(found.statement, callees)]
    if not calls and not any(_is_call(node, callees) for node in ast.walk(tree)):
        return _Reading(function)
    if {id(node) for node in ast.walk(tree) if _is_call(node, callees)} != {id(call) for _, call in calls}:
        raise UnreadableError(f"{function.__name__} calls its denoiser in a condition, or in a function inside it")
    flow = Flow(body, callees, _helper(function, methods))
    channels = _channels(statements)
    sites = tuple(dataclasses.replace(site, channels=channels) for site in _classified(calls, statements, flow))
    called = frozenset(_tail(call.func) for _, call in calls)
    once = function.__name__ != "__call__" and all(found.loop is None for found, _ in calls)
    return _Reading(function, sites, called, once and bool(flow.returned | flow.kept))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


@functools.lru_cache(maxsize=256)
def _tree(code: CodeType) -> ast.stmt:
    lines, first = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    ast.increment_lineno(tree, first - 1)
    Plain().visit(tree)
    return ast.fix_missing_locations(tree)


def _helper(function: FunctionType, methods: Mapping[str, FunctionType]) -> Helper:
    def find(name: str) -> ast.FunctionDef | None:
        known = methods.get(name[5:]) if name.startswith("self.") else function.__globals__.get(name)
        known = inspect.unwrap(known) if callable(known) else None
        try:
            tree = _tree(known.__code__) if isinstance(known, FunctionType) else None
        except OSError:
            return None
        return tree if isinstance(tree, ast.FunctionDef) else None

    return find


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
    attributes = {f"{owner}.{name}" for name in denoisers for owner in ("self", "super()")}
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


def _calls(node: ast.AST, callees: set[str]) -> Iterator[ast.Call]:
    """Find the calls of a denoiser in a simple statement, but not those of functions inside it."""
    if _is_call(node, callees):
        yield node
    if not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, *_COMPOUND)):
        for child in ast.iter_child_nodes(node):
            yield from _calls(child, callees)


def _is_call(node: ast.AST, callees: set[str]) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in callees


def _classified(calls: Sequence[tuple[_Found, ast.Call]], statements: Sequence[_Found], flow: Flow) -> Iterator[Site]:
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


def _cut_as_combined(statements: Sequence[_Found], flow: Flow) -> list[_Split]:
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
        is_half = isinstance(statement.value, ast.Call) and _tail(statement.value.func) == "chunk" and len(rows) == 2
        if read == {("[1]", "[0]")}:
            raise UnreadableError(f"its rows are [{', '.join(rows)}], and {rows[0]} is used as cond")
        if not is_half or read != {("[0]", "[1]")}:
            raise UnreadableError(f"it takes a prediction apart as [{', '.join(rows)}], and which is cond is not clear")
        result.append((found, rows[1], rows[0]))
    return result


def _part(value: Value) -> str | None:
    """Return which part of one prediction a value is; `None` if it is made of several."""
    return next(iter(value))[1] if len(value) == 1 else None


def _combined_with(calls: Sequence[tuple[_Found, ast.Call]], kinds: list[str], flow: Flow) -> list[str]:
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


def _place(calls: Sequence[tuple[_Found, ast.Call]], flow: Flow, value: Value) -> int | None:
    """Return which call a whole prediction is of; `None` if it is not of exactly one."""
    (which, part), *others = value
    made = [place for place, (_, call) in enumerate(calls) if call is flow.calls[which]]
    return made[0] if made and not others and not part else None


def _check_unguided(
    calls: Sequence[tuple[_Found, ast.Call]],
    kinds: Sequence[str],
    statements: Sequence[_Found],
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


def _split_of(call: _Found, calls: Sequence[_Found], splits: Sequence[_Split]) -> _Split:
    """Find where the prediction of a call is taken apart: after it, and before the next one is made."""
    line = call.statement.lineno
    following = [other.statement.lineno for other in calls if other.statement.lineno > line]
    for split in splits:
        if line <= split[0].statement.lineno < min(following, default=sys.maxsize):
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


def _combination(
    call: _Found, cond: str, uncond: str, statements: Sequence[_Found], is_named: bool = True
) -> _Combination | None:
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
            return _Combination(expression, cond, uncond, found.guards, changes, is_named)
    return None
