"""Find an expression or a statement in the syntax tree of a module, and replace it by a mistake.

A pattern is a piece of Python. Formatting, comments and lines do not matter, because trees are compared. A name that
starts with two underscores is a blank: it matches any expression. If a blank occurs twice in a pattern, both places
must hold the same expression. The replacement may use the blanks. ``xp.max(__x, axis=__a)`` finds the maximum of any
array.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

Scope = ast.Module | ast.FunctionDef | ast.ClassDef


def mutated(source: str, *, inside: str, find: str, put: str) -> str:
    """Return the source with one piece of one function replaced.

    ``inside`` is the qualified name of a function or a class; an empty string is the whole module.

    Raises
    ------
    LookupError
        If there is no such function, or if it does not contain the piece exactly once: then the mutant is out of date.
    """
    tree = ast.parse(source)
    scope = _scope(tree, inside)
    # The whole function is searched, because the mistake is ambiguous if there is a second match.
    pattern, replacement = _piece(find), _piece(put)
    matches = [(node, blanks) for node in _nodes(scope) if (blanks := _match(pattern, node)) is not None]
    if len(matches) != 1:
        lines = ", ".join(str(getattr(node, "lineno", "?")) for node, _ in matches)
        raise LookupError(
            f"{inside or 'the module'} must hold this piece once, got {len(matches)} matches"
            f"{f' on lines {lines}' if lines else ''}: {find}"
        )
    node, blanks = matches[0]
    mutant = ast.fix_missing_locations(_Exchange(node, _filled(replacement, blanks)).visit(tree))
    text = ast.unparse(mutant)
    if text == ast.unparse(ast.parse(source)):
        raise LookupError(f"{inside or 'the module'} is the same after the change: {find}")
    return text


def _scope(tree: ast.Module, inside: str) -> Scope:
    """Return the function or class with a qualified name, such as ``outer.inner`` for a function inside a function."""
    scope: Scope = tree
    for name in filter(None, inside.split(".")):
        below = (node for node in ast.walk(scope) if node is not scope)
        direct = [node for node in scope.body if _is_named(node, name)]
        matches = direct or [node for node in below if _is_named(node, name)]
        if len(matches) != 1:
            raise LookupError(f"{inside} must name one function, got {len(matches)} times {name}")
        scope = matches[0]  # type: ignore[assignment]
    return scope


def _is_named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name


def _piece(text: str) -> ast.AST:
    """Return the syntax tree of an expression or of a single statement."""
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _nodes(scope: Scope) -> Iterator[ast.AST]:
    # Only expressions and statements can be replaced.
    for node in ast.walk(scope):
        if isinstance(node, ast.expr | ast.stmt):
            yield node


def _match(pattern: ast.AST, node: ast.AST) -> dict[str, ast.AST] | None:
    """Return the expressions that the blanks stand for, or None if the node differs from the pattern."""
    blanks: dict[str, ast.AST] = {}
    return blanks if _same(pattern, node, blanks) else None


def _same(pattern: object, node: object, blanks: dict[str, ast.AST]) -> bool:
    if isinstance(pattern, ast.Name) and pattern.id.startswith("__") and isinstance(node, ast.expr):
        # At its first place a blank matches any expression, at later places only the same expression.
        known = blanks.setdefault(pattern.id, node)
        return known is node or ast.dump(known) == ast.dump(node)
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_same(*pair, blanks) for pair in zip(pattern, node, strict=True))
        )
    if isinstance(pattern, ast.AST):
        # Whether a name is read or written depends on the place, so this field is not compared.
        return type(pattern) is type(node) and all(
            _same(getattr(pattern, field), getattr(node, field), blanks)
            for field in pattern._fields
            if field not in ("ctx", "type_comment", "kind")
        )
    return type(pattern) is type(node) and pattern == node


def _filled(replacement: ast.AST, blanks: dict[str, ast.AST]) -> ast.AST:
    """Return the replacement with each blank replaced by its expression."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(blanks[node.id]) if node.id in blanks else node

    return Fill().visit(copy.deepcopy(replacement))  # type: ignore[no-any-return]


class _Exchange(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is not self.old:
            return self.generic_visit(node)
        if isinstance(node, ast.stmt) and isinstance(self.new, ast.expr):
            return ast.Expr(self.new)
        return self.new
