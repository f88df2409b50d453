"""Read source and signatures: what `forward` takes, returns and uses, without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# The words in the names that code gives to things, where a name is a sign of what a thing is.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@functools.lru_cache(maxsize=4096)
def words_of(name: str) -> frozenset[str]:
    """Split a name, such as `encoder_hidden_states_2`, `txtIds` or `blocks.0.norm`, into its words, in lower case."""
    return frozenset(word.lower() for word in _WORD.findall(name))


# Arguments of positions belong to tokens, not to rows, even where their number is a multiple of the batch.
_POSITIONAL = words_of("rotary rope freqs ids coords position positions positional")


def is_positional(name: str) -> bool:
    """Tell whether an argument of this name holds positions: one entry per token, not per row."""
    return not _POSITIONAL.isdisjoint(words_of(name))


@functools.cache
def unwrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function below its decorators."""
    plain: Callable[..., Any] = inspect.unwrap(forward)
    return plain


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the `forward` that the module's class defines, below decorators and whatever sits on the instance.

    Where the class defines none, and chooses one of its methods when an instance is made, return that method.
    """
    forward = type(module).forward
    if forward is nn.Module.forward and "forward" in module.__dict__:
        chosen = inspect.unwrap(module.__dict__["forward"])
        if getattr(chosen, "__self__", None) is module:
            forward = chosen.__func__
    return unwrapped(forward)


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return the signature of the `forward` that the module's class defines."""
    return _signature(class_forward(module))


def bound_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], signature: inspect.Signature | None = None
) -> dict[str, Any]:
    """Map the arguments of a call to the parameter names of the module's `forward`, defaults left out.

    Args:
        module: the module that was called.
        args: its positional arguments, `self` not among them.
        kwargs: its keyword arguments.
        signature: `signature_of` the module, for calls that torch.compile traces: it follows no cache.

    Returns:
        Name to value; members of `**kwargs` under their own names, `*args` as one tuple.
    """
    signature = signature or signature_of(module)
    try:
        bound = signature.bind(module, *args, **kwargs).arguments
    except TypeError:  # a decorator takes more than the function below it: positions are all there is
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    named = dict(list(bound.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


Mention = tuple[str, slice | int]
"""An attribute of `self`, and which of its entries are meant."""


def running_order(module: nn.Module) -> list[list[Mention]]:
    """Read in which order the `forward` of a module's class uses attributes of `self`.

    Methods that it calls are followed. What is iterated over together, in one `zip`, runs entry by entry.

    Args:
        module: any module.

    Returns:
        Groups of attributes in running order, those of one group in turns. An attribute may come several times.
    """
    cls: Any = type(module)
    return _running_order(cls, class_forward(module))


@functools.cache
def _running_order(cls: Any, forward: Callable[..., Any]) -> list[list[Mention]]:
    reader = _Reader(cls)
    reader.read(forward)
    code = getattr(forward, "__code__", None)
    if reader.groups or code is None:
        return reader.groups
    return [[(name, slice(None))] for name in code.co_names]  # no source


class _Reader(ast.NodeVisitor):
    """Walks a method in the order in which it runs and notes its attributes of `self`."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.groups: list[list[Mention]] = []
        self._cls = cls
        self._read: set[str] = set()

    def read(self, method: Callable[..., Any]) -> None:
        tree = parsed(method)
        if tree is not None:
            for statement in tree.body:
                self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.id if isinstance(node.func, ast.Name) else None
        if called in ("len", "hasattr", "isinstance"):
            return
        if called == "zip":
            together = [mention for argument in node.args if (mention := _mention(argument)) is not None]
            if together:
                self.groups.append(together)
        name = attribute_of_self(node.func)
        method = getattr(self._cls, name or "", None)
        self.generic_visit(node)
        if name is not None and inspect.isfunction(method) and name not in self._read:
            self._read.add(name)
            self.read(unwrapped(method))

    def visit_For(self, node: ast.For) -> None:
        """Put what runs in one turn of a loop over a list (`if i == 0: x = self.init_attn(x)`) at its place in it."""
        once, mention, begun = _once_in(node), _mention(node.iter), 0
        if once and mention is not None:
            for end, statement in once:
                self.groups.append([(mention[0], slice(begun, end))])
                self.visit(statement)
                begun = end
            self.groups.append([(mention[0], slice(begun, None))])
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        return

    def visit_Subscript(self, node: ast.Subscript) -> None:
        mention = _mention(node)
        if mention is None:
            self.generic_visit(node)
        else:
            self.groups.append([mention])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        mention = _mention(node)
        if mention is None:
            self.generic_visit(node)
        else:
            self.groups.append([mention])


def _once_in(loop: ast.For) -> list[tuple[int, ast.If]]:
    """List the statements that run in one turn of `for i, block in enumerate(...)`, after how many calls of `block`."""
    target, found = loop.target, []
    if not isinstance(loop.iter, ast.Call) or not isinstance(target, ast.Tuple) or len(target.elts) != 2:
        return []
    index, block = (ast.unparse(element) for element in target.elts)
    has_run = False
    for statement in loop.body:
        if isinstance(statement, ast.If):
            tests = statement.test.values if isinstance(statement.test, ast.BoolOp) else [statement.test]
            texts = map(ast.unparse, tests)
            turns = [int(text.removeprefix(f"{index} == ")) for text in texts if re.fullmatch(rf"{index} == \d+", text)]
            found += [(turn + has_run, statement) for turn in turns[:1]]
        has_run = has_run or any(isinstance(n, ast.Name) and n.id == block for n in ast.walk(statement))
    return sorted(found, key=lambda entry: entry[0])


def _mention(node: ast.expr) -> Mention | None:
    """Understand `self.blocks`, `self.blocks[1:]`, `self.blocks[0]`, `self.blocks[i]` (any) and `enumerate(...)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "iter"):
        return _mention(node.args[0]) if node.args else None
    if isinstance(node, ast.Subscript):
        name = attribute_of_self(node.value)
        return None if name is None else (name, _entries(node.slice))
    name = attribute_of_self(node)
    return None if name is None else (name, slice(None))


def attribute_of_self(node: ast.expr) -> str | None:
    """Return which attribute of `self` an expression names."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _entries(node: ast.expr) -> slice | int:
    try:
        if isinstance(node, ast.Slice):
            parts = (node.lower, node.upper, node.step)
            return slice(*(None if part is None else int(ast.literal_eval(part)) for part in parts))
        return int(ast.literal_eval(node))
    except (ValueError, TypeError):
        return slice(None)


ReturnNames = str | tuple[str | None, ...]
"""What a `return` statement names: one variable, or a tuple of variables and `None`s."""


@functools.cache
def return_names(forward: Callable[..., Any]) -> ReturnNames | None:
    """Read which variables a function returns.

    Args:
        forward: a plain function, not a bound method.

    Returns:
        The names, `None` standing for a literal `None` in a tuple; `None` when the source is not there,
        returns differ, or something other than plain names is returned.
    """
    tree = parsed(forward)
    if tree is None:
        return None
    found = {_names_of(node.value) for node in _returns(tree)}
    return found.pop() if len(found) == 1 else None


@functools.cache
def names_in_return(forward: Callable[..., Any], position: int, count: int) -> frozenset[str]:
    """Collect the variables that the `return` statements of a function mention for one of its outputs.

    Args:
        forward: a plain function, not a bound method.
        position: which output, from 0.
        count: how many there are.

    Returns:
        Names; those of the whole statement where it does not list `count` outputs. Empty without source.
    """
    tree = parsed(forward)
    values = [node.value for node in _returns(tree)] if tree is not None else []
    parts = [
        value.elts[position] if isinstance(value, ast.Tuple) and len(value.elts) == count else value for value in values
    ]
    return frozenset(
        node.id for part in parts if part is not None for node in ast.walk(part) if isinstance(node, ast.Name)
    )


@functools.cache
def parsed(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Parse a function; `None` without source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _returns(node: ast.AST) -> Iterator[ast.Return]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _returns(child)


def _names_of(value: ast.expr | None) -> ReturnNames | None:
    if isinstance(value, ast.Name):
        return value.id
    if isinstance(value, ast.Tuple):
        names: list[str | None] = []
        for element in value.elts:
            if isinstance(element, ast.Name):
                names.append(element.id)
            elif isinstance(element, ast.Constant) and element.value is None:
                names.append(None)
            else:
                return None
        return tuple(names)
    return None


def parameter_names(module: nn.Module) -> list[str]:
    """List the parameter names of the module's `forward` in order, `self` left out."""
    return list(_signature(class_forward(module)).parameters)[1:]


def signature_text(module: nn.Module) -> str:
    """Write the parameters of the module's `forward`, without `self` and annotations."""
    parameters = list(_signature(class_forward(module)).parameters.values())[1:]
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))
