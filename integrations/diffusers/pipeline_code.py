"""Find, in a pipeline's own code, the calls of its denoiser, and the statements around them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType

from stg_hooks.integrations.diffusers.call_sites import CallSite, UnreadableError, classified, described, takes_apart
from stg_hooks.integrations.diffusers.combinations import Found, Guards, tail

_CONTEXT = "cache_context"
_APART = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Match, ast.AsyncFor, ast.AsyncWith),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


def call_sites_of(cls: type, base: type, denoisers: tuple[str, ...]) -> dict[CodeType, tuple[CallSite, ...]]:
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
    own = list(itertools.takewhile(lambda owner: owner is not base, cls.__mro__))
    mixed_in = [owner for owner in cls.__mro__ if owner not in own and owner not in base.__mro__]
    return dict(_read_together(tuple(_functions(own)), tuple(_functions(mixed_in)), denoisers))


def _functions(owners: Sequence[type]) -> Iterator[FunctionType]:
    for owner in owners:
        for value in vars(owner).values():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType):
                yield function


@functools.lru_cache(maxsize=64)
def _read_together(
    functions: tuple[FunctionType, ...], mixed_in: tuple[FunctionType, ...], denoisers: tuple[str, ...]
) -> dict[CodeType, tuple[CallSite, ...]]:
    methods = {function.__name__: function for function in reversed((*functions, *mixed_in))}
    alone = read = {function: _read(function, denoisers, methods) for function in functions}
    wrappers: set[str] = set()
    while found := {function.__name__ for function, sites in read.items() if _hands_on(function, sites)} - wrappers:
        wrappers |= found
        read = {function: _read(function, (*denoisers, *sorted(wrappers)), methods) for function in functions}
    # What only hands a prediction on is as its callers are, if these say more than it does.
    read = {function: sites for function, sites in read.items() if function.__name__ not in wrappers}
    if all(map(_is_plain, itertools.chain(*read.values()))):
        read = alone
    if {"both", "cond"} <= {site.kind for sites in read.values() for site in sites}:
        raise UnreadableError("some calls are for [uncond, cond], and others for cond alone")
    return {function.__code__: sites for function, sites in read.items() if sites}


def _is_plain(site: CallSite) -> bool:
    return site.kind in ("cond", "unused") and site.guards is None


def _hands_on(function: FunctionType, sites: Sequence[CallSite]) -> bool:
    """Return whether a method may do nothing but call a denoiser for its callers."""
    if function.__name__ == "__call__" or len(sites) != 1 or not _is_plain(sites[0]):
        return False
    nodes = list(ast.walk(_tree(function.__code__)))
    loops = any(isinstance(node, (ast.For, ast.While)) for node in nodes)
    return not loops and any(isinstance(node, ast.Return) and node.value is not None for node in nodes)


def _read(
    function: FunctionType, denoisers: tuple[str, ...], methods: Mapping[str, FunctionType]
) -> tuple[CallSite, ...]:
    """Find a function's calls of a denoiser, and what they are for; `methods` may take predictions apart for it.

    Raises:
        UnreadableError: it calls a denoiser, but for what cannot be told.
        OSError: its source is not there.
    """
    if not set(denoisers) & set(_names_in(function.__code__)):
        return ()
    tree = _tree(function.__code__)
    statements = list(_statements(getattr(tree, "body", []), (), None, None))
    callees = _callees(statements, denoisers)
    calls = [(found, call) for found in statements for call in _calls(found.statement, callees)]
    everywhere = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in callees]
    if len(everywhere) != len(calls):
        raise UnreadableError(f"{function.__name__} calls its denoiser in a condition, or in a function inside it")
    statements = list(_with_methods(statements, {found.target for found, _ in calls} - {""}, methods))
    return tuple(described([*classified(calls, statements)], calls, statements))


def _with_methods(
    statements: Sequence[Found], predictions: set[str], methods: Mapping[str, FunctionType]
) -> Iterator[Found]:
    """Write out the methods that predictions are given to and that take them apart, in the place of their calls."""
    for found in statements:
        call = found.value
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{tail(call.func)}":
            method = methods.get(tail(call.func))
            if method is not None and predictions & {tail(argument) for argument in call.args}:
                yield from _written_out(method, call, found)
        yield found


def _written_out(method: FunctionType, call: ast.Call, at: Found) -> Iterator[Found]:
    tree = copy.deepcopy(_tree(method.__code__))
    if not isinstance(tree, ast.FunctionDef) or not takes_apart(list(_statements(tree.body, (), None, None))):
        return
    parameters = [parameter.arg for parameter in tree.args.args[1:]]
    given = dict(zip(parameters, call.args, strict=False))
    given |= {word.arg: word.value for word in call.keywords if word.arg}
    _Given(given).visit(tree)
    for node in ast.walk(tree):
        ast.copy_location(node, at.statement)
    for inner in _statements(tree.body, at.guards, at.context, at.loop):
        yield dataclasses.replace(inner, loop=at.loop)


class _Given(ast.NodeTransformer):
    """Put what a method is given in the place of its parameters."""

    def __init__(self, given: Mapping[str, ast.expr]) -> None:
        self._given = given

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Replace a parameter; one that is assigned to only by another name."""
        value = self._given.get(node.id)
        if value is None or (isinstance(node.ctx, ast.Store) and not isinstance(value, ast.Name)):
            return node
        return ast.Name(value.id, node.ctx) if isinstance(value, ast.Name) else copy.deepcopy(value)


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
    _Plain().visit(tree)
    return ast.fix_missing_locations(tree)


class _Plain(ast.NodeTransformer):
    """Rewrite other spellings: `a += b`, `a: T = b`, and `torch.lerp(u, c, w)` as `u + w * (c - u)`."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """Write `a += b` as `a = a + b`."""
        self.generic_visit(node)
        return _at(f"{ast.unparse(node.target)} = {ast.unparse(ast.BinOp(node.target, node.op, node.value))}", node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Leave the annotation out."""
        self.generic_visit(node)
        return node if node.value is None else _at(f"{ast.unparse(node.target)} = {ast.unparse(node.value)}", node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write `lerp` out."""
        self.generic_visit(node)
        if tail(node.func) != "lerp":
            return node
        given = [*node.args, *(word.value for word in node.keywords)]
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch":
            given.insert(0, node.func.value)
        if len(given) != 3:
            return node
        start, end, weight = given
        product = ast.BinOp(weight, ast.Mult(), ast.BinOp(end, ast.Sub(), start))
        expression = _at(ast.unparse(ast.BinOp(start, ast.Add(), product)), node)
        return expression.value if isinstance(expression, ast.Expr) else node


def _at(text: str, old: ast.AST) -> ast.stmt:
    """Parse a statement that stands in the place of another node."""
    new = ast.parse(text).body[0]
    for node in ast.walk(new):
        ast.copy_location(node, old)
    return new


def _statements(
    body: Sequence[ast.stmt], guards: Guards, context: ast.expr | None, loop: ast.stmt | None
) -> Iterator[Found]:
    """Yield the simple statements of a function, but not those of functions inside it."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.body, (*guards, statement.test), context, loop)
            negated = ast.UnaryOp(ast.Not(), statement.test)
            yield from _statements(statement.orelse, (*guards, negated), context, loop)
        elif isinstance(statement, (ast.With, ast.For, ast.While, ast.Try)):
            parts = [statement, *getattr(statement, "handlers", ())]
            inner = [one for part in parts for one in part.body]
            inner += [*getattr(statement, "orelse", ()), *getattr(statement, "finalbody", ())]
            is_loop = isinstance(statement, (ast.For, ast.While))
            named = _context(statement) if isinstance(statement, ast.With) else None
            yield from _statements(inner, guards, named or context, loop or (statement if is_loop else None))
        elif not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield Found(statement, guards, context, loop)


def _context(statement: ast.With) -> ast.expr | None:
    calls = [item.context_expr for item in statement.items]
    names = (call.args[0] for call in calls if isinstance(call, ast.Call) and call.args and tail(call.func) == _CONTEXT)
    return next(names, None)


def _callees(statements: Sequence[Found], denoisers: tuple[str, ...]) -> set[str]:
    """Return what denoisers are called in the code: `self.transformer`, and names that it is assigned to."""
    attributes = {f"{owner}.{name}" for name in denoisers for owner in ("self", "super()")}
    return attributes | {found.target for found in statements if found.value and _is_any(found.value, attributes)}


def _is_any(value: ast.expr, texts: set[str]) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_any(value.body, texts) or _is_any(value.orelse, texts)
    return ast.unparse(value) in texts


def _calls(node: ast.AST, callees: set[str]) -> Iterator[ast.Call]:
    """Find the calls of a denoiser in a simple statement, but not those of functions inside it."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in callees:
        yield node
    if not isinstance(node, _APART):
        for child in ast.iter_child_nodes(node):
            yield from _calls(child, callees)
