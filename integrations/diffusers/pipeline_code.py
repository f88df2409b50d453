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
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import TypeGuard

from stg_hooks.integrations.diffusers.call_roles import Found, channels_of, classified
from stg_hooks.integrations.diffusers.call_sites import Guards, Site, UnreadableError
from stg_hooks.integrations.diffusers.formulas import Plain, tail
from stg_hooks.integrations.diffusers.predictions import Flow, Helper

_COMPOUND = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Match, ast.AsyncFor, ast.AsyncWith)


def call_sites_of(cls: type, base: type, denoisers: tuple[str, ...]) -> dict[CodeType, tuple[Site, ...]]:
    """Find the calls of its denoisers in all methods of a pipeline class, in what it overrides as well.

    Args:
        cls: the class.
        base: where its own methods end.
        denoisers: the attributes of `self` that are denoisers.

    Returns:
        The calls of each method's code that makes any.

    Raises:
        UnreadableError: one of them calls a denoiser, but for what cannot be told.
        OSError: its source is not there.
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
    channels = channels_of(statements)
    sites = tuple(dataclasses.replace(site, channels=channels) for site in classified(calls, statements, flow))
    called = frozenset(tail(call.func) for _, call in calls)
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
) -> Iterator[Found]:
    """Yield the simple statements of a function, but not those of functions inside it."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.body, (*guards, statement.test), context, loop)
            negated = ast.UnaryOp(ast.Not(), statement.test)
            yield from _statements(statement.orelse, (*guards, negated), context, loop)
        elif isinstance(statement, ast.With):
            names = [item.context_expr for item in statement.items]
            named = [n.args[0] for n in names if isinstance(n, ast.Call) and n.args and tail(n.func) == "cache_context"]
            yield from _statements(statement.body, guards, named[0] if named else context, loop)
        elif isinstance(statement, (ast.For, ast.While)):
            yield from _statements([*statement.body, *statement.orelse], guards, context, loop or statement)
        elif isinstance(statement, ast.Try):
            parts = [*statement.body, *(s for handler in statement.handlers for s in handler.body)]
            yield from _statements([*parts, *statement.orelse, *statement.finalbody], guards, context, loop)
        elif not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield Found(statement, guards, context, loop)


def _callees(statements: Sequence[Found], denoisers: tuple[str, ...]) -> set[str]:
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
