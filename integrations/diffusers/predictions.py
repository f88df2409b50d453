"""Follow a denoiser's predictions through a function's code: which are made of which, and which are guided with which.

The code is gone through once, in its order, loops twice; nothing is executed. A value is known by the calls that it was
predicted by, and by which part it is of what they returned.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

from stg_hooks.integrations.diffusers.formulas import Formula, formula, tail

Part: TypeAlias = "tuple[int, str]"  # which of the calls that are made; which part of its prediction, "" for all of it
Value: TypeAlias = "frozenset[Part]"
Helper: TypeAlias = "Callable[[str], ast.FunctionDef | None]"

_NOTHING: Value = frozenset()
_TELLS_NO_VALUE = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "len"}
_CUTS = {"chunk", "split", "unbind", "tensor_split"}
_JOINS = {"cat", "concat", "concatenate", "stack", "append", "extend", "zip", "list", "tuple"}


@dataclasses.dataclass(frozen=True)
class Guided:
    """A formula in the code, over predictions."""

    formula: Formula
    cond: Value
    uncond: Value


class Flow:
    """What becomes of the predictions in a function."""

    def __init__(
        self, body: Sequence[ast.stmt], callees: set[str], helper: Helper = lambda name: None, skipped: str = ""
    ) -> None:
        """Go through a function.

        Args:
            body: its statements, in `Plain` spelling.
            callees: what is called where a denoiser is.
            helper: finds the code of a function that is called, by its dotted name.
            skipped: a condition under which nothing is looked at.
        """
        self.calls: list[ast.Call | None] = []  # one for each time that the code comes to it; None: what joins several
        self.returned: Value = _NOTHING
        self.kept: Value = _NOTHING
        self.guided: list[Guided] = []
        self.cut: dict[int, Value] = {}  # by the identity of `a, b = prediction.chunk(2)`
        self.body, self.callees, self.helper, self._skipped = body, callees, helper, skipped
        self._conflicts: list[tuple[ast.expr, list[tuple[Part, Part]]]] = []
        self._tiles: set[int] = set()
        self._made_of: list[frozenset[int]] = []
        self._under: list[tuple[tuple[int, bool], ...]] = []
        self._branches: tuple[tuple[int, bool], ...] = ()
        self._ids = itertools.count()
        self._values: dict[str, Value] = {}
        self._inner: dict[str, ast.FunctionDef] = {}
        self._inside: tuple[str, ...] = ()
        self._body(body)

    @property
    def hands_on_both(self) -> bool:
        """Whether predictions that are made side by side are returned, or kept on the pipeline."""
        return any(self._are_side_by_side(value, value) for value in (self.returned, self.kept))

    @property
    def conflicts(self) -> list[ast.expr]:
        """What brings together predictions that are made side by side, and are no tiles of one."""
        return [node for node, pairs in self._conflicts if not all(map(self._are_tiles, pairs))]

    def _are_tiles(self, pair: tuple[Part, Part]) -> bool:
        (a, part), (b, other) = pair
        return part == other and self.calls[a] is self.calls[b] and id(self.calls[a]) in self._tiles

    def _body(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If):
            self._if(statement)
        elif isinstance(statement, (ast.For, ast.While)):
            self._loop(statement)
        elif isinstance(statement, ast.With):
            for item in statement.items:
                self._of(item.context_expr)
            self._body(statement.body)
        elif isinstance(statement, ast.Try):
            self._body(statement.body)
            for handler in statement.handlers:
                self._body(handler.body)
            self._body([*statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.Match):
            for case in statement.cases:
                self._body(case.body)
        elif isinstance(statement, ast.FunctionDef):
            self._inner[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            self._assignment(statement)
        elif isinstance(statement, ast.Return):
            self.returned |= self._of(statement.value)
        elif isinstance(statement, ast.Expr):
            self._expression(statement.value)

    def _if(self, statement: ast.If) -> None:
        self._of(statement.test)
        if ast.unparse(statement.test) == self._skipped:
            self._body(statement.orelse)
            return
        before, outer, number = dict(self._values), self._branches, next(self._ids)
        self._branches = (*outer, (number, True))
        self._body(statement.body)
        after, self._values = self._values, before
        self._branches = (*outer, (number, False))
        self._body(statement.orelse)
        self._branches = outer
        for name, value in after.items():
            self._values[name] = self._values.get(name, _NOTHING) | value

    def _loop(self, statement: ast.For | ast.While) -> None:
        first = len(self.calls)
        for _ in range(2):
            if isinstance(statement, ast.For):
                self._assign(statement.target, self._of(statement.iter))
            else:
                self._of(statement.test)
            self._body(statement.body)
        inside = [place for place in range(first, len(self.calls)) if self.calls[place] is not None]
        if any(before in self._made_of[place] for place in inside for before in inside):
            self._values.clear()  # it goes through steps: what it leaves are samples
        self._body(statement.orelse)

    def _expression(self, value: ast.expr) -> None:
        if isinstance(value, (ast.Yield, ast.YieldFrom)):
            self.returned |= self._of(value.value)
            return
        found = self._of(value)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):  # it may change its owner
            if tail(value.func) == "index_add_":
                self._tile(found)
            self._add(value.func.value, found, joined=tail(value.func) in _JOINS)

    def _add(self, owner: ast.expr, value: Value, joined: bool = False) -> None:
        while isinstance(owner, (ast.Subscript, ast.Attribute, ast.Starred)):
            owner = owner.value
        if isinstance(owner, ast.Name) and owner.id != "self":
            value |= self._values.get(owner.id, _NOTHING)
            self._values[owner.id] = self._joined(value) if joined else value

    def _joined(self, value: Value) -> Value:
        """Return what a list or a tensor of several predictions is: one thing, of which each one is a part."""
        if not self._are_side_by_side(value, value):
            return value
        return self._made(None, value)

    def _made(self, call: ast.Call | None, value: Value) -> Value:
        calls = frozenset(call for call, _ in value)
        self._made_of.append(calls.union(*(self._made_of[call] for call in calls)))
        self._under.append(self._branches)
        self.calls.append(call)
        return frozenset({(len(self.calls) - 1, "")})

    def _assignment(self, statement: ast.Assign) -> None:
        for target in statement.targets:
            tile = _put_in_place(target, statement.value)
            if tile is not None:
                self._tile(self._of(tile))
                self._add(target, self._of(tile))
            elif not isinstance(target, (ast.Tuple, ast.List)):
                self._assign(target, self._of(statement.value))
            elif isinstance(statement.value, (ast.Tuple, ast.List)) and len(statement.value.elts) == len(target.elts):
                values = [self._of(value) for value in statement.value.elts]
                for one, value in zip(target.elts, values, strict=True):
                    self._assign(one, value)
            else:
                value, source = self._of(statement.value), statement.value
                whole = isinstance(source, ast.Call) and not self._returns_rows(source)
                if isinstance(source, ast.Call) and tail(source.func) in _CUTS and not whole:
                    self.cut[id(statement)] = value
                for i, one in enumerate(target.elts):
                    self._assign(one, value if whole else _parts(value, f"[{i}]"))

    def _tile(self, value: Value) -> None:
        """Note that predictions are put together to a larger one."""
        self._tiles |= {id(self.calls[call]) for call, _ in value}

    def _returns_rows(self, call: ast.Call) -> bool:
        """Return whether the results of a call may be rows of one prediction."""
        if tail(call.func) in _CUTS:
            return not _cuts_something_else(call)
        if ast.unparse(call.func) in self.callees or ast.unparse(call.func).startswith(("torch.", "einops.")):
            return True
        return isinstance(call.func, ast.Attribute) and bool(self._of(call.func.value))

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for one in target.elts:
                self._assign(one, value)
            return
        text = ast.unparse(target)
        for name in [name for name in self._values if name.startswith((f"{text}.", f"{text}["))]:
            del self._values[name]
        self._values[text] = value
        if text.startswith("self."):
            self.kept |= value
        if not isinstance(target, ast.Name):
            self._add(target, value)

    def _of(self, node: ast.AST | None) -> Value:
        """Return what predictions an expression is made of."""
        if node is None or isinstance(node, (ast.Lambda, ast.Constant)):
            return _NOTHING
        if isinstance(node, ast.NamedExpr):
            value = self._of(node.value)
            self._assign(node.target, value)
            return value
        if isinstance(node, ast.Attribute) and node.attr in _TELLS_NO_VALUE:
            return _NOTHING
        if isinstance(node, ast.Name):
            return self._values.get(node.id, _NOTHING)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            known = self._values.get(ast.unparse(node))
            if known is not None:
                return known
        if isinstance(node, ast.Attribute):
            return self._of(node.value)
        if isinstance(node, ast.Subscript):
            return _parts(self._of(node.value), _row(node.slice))
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            for generator in node.generators:
                self._assign(generator.target, self._of(generator.iter))
            return self._of(node.elt)
        if isinstance(node, ast.Compare):
            for compared in (node.left, *node.comparators):
                self._of(compared)
            return _NOTHING
        return _NOTHING.union(*(self._of(child) for child in ast.iter_child_nodes(node)))

    def _arithmetic(self, node: ast.BinOp) -> Value:
        left, right = self._of(node.left), self._of(node.right)
        found = formula(node)
        if found is not None:
            cond, uncond = (self._of(_expression_of(text)) for text in (found.cond, found.uncond))
            if self._are_side_by_side(cond, uncond):
                self.guided.append(Guided(found, cond, uncond))
        self._note(node, left, right)
        return left | right

    def _note(self, node: ast.expr, left: Value, right: Value) -> None:
        pairs = [(a, b) for a in left for b in right if self._differ(a, b)]
        if pairs:
            self._conflicts.append((node, pairs))

    def _call(self, node: ast.Call) -> Value:
        name = ast.unparse(node.func)
        given = [*node.args, *(word.value for word in node.keywords)]
        values = [self._of(value) for value in given]
        if name in self.callees:
            return self._made(node, _NOTHING.union(*values))
        if tail(node.func) in _TELLS_NO_VALUE:
            return _NOTHING
        values.append(self._of(node.func.value) if isinstance(node.func, ast.Attribute) else _NOTHING)
        made = _NOTHING.union(*values)
        if tail(node.func) in _JOINS:
            return self._joined(made)
        if not tail(node.func)[:1].isupper() and "scheduler" not in name:
            for a, b in itertools.combinations(values, 2):
                self._note(node, a, b)
        if made or name in self._inner:
            made |= self._look_into(name, node, values)
        return made

    def _look_into(self, name: str, node: ast.Call, values: Sequence[Value]) -> Value:
        """Go through a function that predictions are handed to, and return what it returns."""
        inner = self._inner.get(name)
        code = None if name in self._inside or len(self._inside) > 2 else inner or self.helper(name)
        if code is None:
            return _NOTHING
        outer = self._values, self._inside, self.returned, self.kept
        names = [argument.arg for argument in (*code.args.posonlyargs, *code.args.args) if argument.arg != "self"]
        words = [word.arg or "" for word in node.keywords]
        self._values = {} if inner is None else dict(self._values)
        self._values.update(zip([*names[: len(node.args)], *words], values, strict=False))
        self._inside = (*self._inside, name)
        before = len(self.guided), len(self.cut)
        self._body(code.body)
        if (len(self.guided), len(self.cut)) != before:
            self._conflicts.append((node, [((0, "in"), (0, "it"))]))  # guided out of sight: never two tiles of one
            del self.guided[before[0] :]
        returned = self.returned - outer[2]
        self._values, self._inside, self.returned, self.kept = outer
        return returned

    def _are_side_by_side(self, left: Value, right: Value) -> bool:
        """Return whether some predictions differ in their rows, or in what else the denoiser was given."""
        return any(self._differ(a, b) for a in left for b in right)

    def _differ(self, a: Part, b: Part) -> bool:
        if a[0] == b[0]:
            return a[1] != b[1]
        if a[0] in self._made_of[b[0]] or b[0] in self._made_of[a[0]]:
            return False  # the latents of the one are made of the other: another step
        return not any((number, not taken) in self._under[b[0]] for number, taken in self._under[a[0]])


def _expression_of(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _put_in_place(target: ast.expr, value: ast.expr) -> ast.expr | None:
    """Return what a part of a canvas gets added, `canvas[top:bottom] += tile`; `None` if it is not so."""
    if not (isinstance(target, ast.Subscript) and isinstance(value, ast.BinOp)):
        return None
    is_part = any(isinstance(node, ast.Slice) for node in ast.walk(target))
    return value.right if is_part and ast.unparse(value.left) == ast.unparse(target) else None


def _parts(value: Value, part: str) -> Value:
    return frozenset((call, before + part) for call, before in value)


def _row(index: ast.expr) -> str:
    """Say which rows an index takes; nothing if all of them, or the first thing that a denoiser returns."""
    if isinstance(index, ast.Tuple) and index.elts:
        first = index.elts[0]
        if isinstance(first, ast.Slice):
            return _row(first)
        return "" if isinstance(first, ast.Constant) and first.value in (..., None) else f"[{ast.unparse(first)}]"
    if isinstance(index, ast.Slice) and index.lower is None and index.upper is None:
        return ""
    if isinstance(index, ast.Constant) and (index.value in (0, ..., None) or isinstance(index.value, str)):
        return ""
    return f"[{ast.unparse(index)}]"


def _cuts_something_else(call: ast.Call) -> bool:
    """Return whether `chunk` or `split` cuts another dimension than that of the rows."""
    if tail(call.func) not in _CUTS:
        return False
    is_method = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) != "torch"
    place = (0 if tail(call.func) == "unbind" else 1) + (not is_method)
    dims = [word.value for word in call.keywords if word.arg == "dim"] or call.args[place : place + 1]
    return bool(dims) and ast.unparse(dims[0]) != "0"


def doubles(node: ast.AST) -> bool:
    """Return whether an expression puts the same rows twice: `torch.cat([x, x])`, `torch.cat([x] * 2)`."""
    for call in ast.walk(node):
        if not (isinstance(call, ast.Call) and tail(call.func) in ("cat", "concat", "concatenate") and call.args):
            continue
        dims = [word.value for word in call.keywords if word.arg in ("dim", "axis")] or call.args[1:2]
        if dims and ast.unparse(dims[0]) != "0":
            continue
        parts = call.args[0]
        if isinstance(parts, ast.BinOp) and isinstance(parts.op, ast.Mult):
            return True
        if isinstance(parts, (ast.List, ast.Tuple)):
            texts = [ast.unparse(part) for part in parts.elts]
            if len(texts) > 1 and len(set(texts)) == 1:
                return True
    return False
