"""Every combination in docs/compatibility.md names tests, and they exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """Return the cells of all tables' rows, without their heads."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "combination" and set(row[0]) != {"-"}]


def cases(file: str, name: str) -> set[str]:
    """List the values that a test is parametrised with."""
    test = getattr(importlib.import_module(f"tests.{file.removesuffix('.py')}"), name)
    return {str(value) for mark in test.pytestmark if mark.name == "parametrize" for value in mark.args[1]}


def problem(row: list[str]) -> str | None:
    """Say what is wrong with a row: its form, or a test that does not exist."""
    if len(row) != 3 or not all(row):
        return f"{row}: expected | combination | what happens | tests |"
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)(?:\[(\w+)\])?`", row[2])
    if not named or len(named) != row[2].count("::"):
        return f"{row[2]}: expected `test_file.py::test_name`, several with commas between them"
    for file, name, case in named:
        path = TESTS / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            return f"there is no test {file}::{name}"
        if case and case not in cases(file, name):
            return f"there is no case {case} of {file}::{name}"
    return None


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0])
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert problem(row) is None


def test_there_are_rows() -> None:
    assert len(rows(PAGE)) > 60


@pytest.mark.parametrize(
    "row",
    [
        "| a | b | `test_compatibility.py::test_that_is_missing` |",
        "| a | b | `test_missing.py::test_there_are_rows` |",
        "| a | b | test_compatibility.py::test_there_are_rows |",
        "| a | b | `test_parallel.py::test_ranks[missing]` |",
        "| a | b | |",
        "| a | `test_compatibility.py::test_there_are_rows` |",
    ],
)
def test_the_check_sees(row: str) -> None:
    assert problem(rows(row)[0]) is not None
