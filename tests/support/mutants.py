"""Mutants: the code of a module with the checks of some steps taken out, to show that a test of such a check can fail.

A check is found by the step of SPEC that it names, wherever it stands: `_require(..., "off-6", ...)` or any other call
that is given the step, an `if` that raises an error with the step, a `try` whose handler does. The functions of the
module get the code without it, in place, so that whoever imported them runs the mutant.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_REMOVED: list[str] = []
"""The steps that are taken out now."""


class _Cut(ast.NodeTransformer):
    """Takes out the statements that check one of `steps`; counts those of the last one."""

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self.found = 0

    def _named(self, call: ast.AST) -> str | None:
        if not isinstance(call, ast.Call):
            return None
        given = (*call.args, *(keyword.value for keyword in call.keywords))
        steps = (value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str))
        return next((step for step in steps if step in self.steps), None)

    def _raised(self, body: list[ast.stmt]) -> str | None:
        raised = (self._named(item.exc) for item in body if isinstance(item, ast.Raise) and item.exc is not None)
        return next((step for step in raised if step), None)

    def _cut(self, node: ast.stmt, step: str) -> ast.stmt:
        self.found += step == self.steps[-1]
        return ast.copy_location(ast.Pass(), node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        step = self._named(node.value)
        return self._cut(node, step) if step else node

    def visit_Try(self, node: ast.Try) -> ast.stmt:
        step = next((found for handler in node.handlers if (found := self._raised(handler.body))), None)
        if step:
            return self._cut(node, step)
        self.generic_visit(node)
        return node

    def visit_If(self, node: ast.If) -> ast.stmt:
        step = self._raised(node.body)
        if step:
            return self._cut(node, step)
        self.generic_visit(node)
        return node


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """The functions and methods that a module defines."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            yield value
        elif inspect.isclass(value):
            for part in vars(value).values():
                function: Any = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    yield function


@contextmanager
def without(step: str, *modules: ModuleType) -> Iterator[None]:
    """Runs what follows without the checks of `step` in `modules`, and of the mutants around it; fails where there are none."""
    found = 0
    _REMOVED.append(step)
    with ExitStack() as undo:
        undo.callback(_REMOVED.pop)
        for module in modules:
            assert module.__file__ is not None
            source = Path(module.__file__).read_text("utf-8")
            if f'"{step}"' not in source:
                continue
            cut = _Cut(_REMOVED)
            tree = cut.visit(ast.parse(source))
            found += cut.found
            if not cut.found:
                continue
            whole = compile(ast.fix_missing_locations(tree), module.__file__, "exec", dont_inherit=True)
            codes = {(code.co_qualname, code.co_firstlineno): code for code in _codes(whole)}
            for function in _functions(module):
                code = function.__code__
                changed = codes.get((code.co_qualname, code.co_firstlineno))
                if changed is not None and changed.co_freevars == code.co_freevars:
                    undo.callback(setattr, function, "__code__", code)
                    function.__code__ = changed
        assert found, f"no check of {step}"
        yield
