"""Find an expression or a statement in the syntax tree of a module, and put a mistake in its place.

A pattern is a piece of Python. Formatting, comments and lines do not matter, because trees are compared. A name that
starts with two underscores is a blank: it matches any expression, the same expression everywhere in the pattern, and
the replacement may use it. ``xp.max(__x, axis=__a)`` finds the maximum of any array.
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
        If there is no such function, or not exactly one such piece in it: then the mutant is out of date.
    """
    tree = ast.parse(source)
    scope = _scope(tree, inside)
    # All places are searched, because a second match would make the mistake ambiguous.
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
    """Return a function or a class by qualified name; functions inside functions are named with dots, too."""
    scope: Scope = tree
    for name in filter(None, inside.split(".")):
        below = (node for node in ast.walk(scope) if node is not scope)
        direct = [node for node in scope.body if _is_named(node, name)]
        found = direct or [node for node in below if _is_named(node, name)]
        if len(found) != 1:
            raise LookupError(f"{inside} must name one function, got {len(found)} times {name}")
        scope = found[0]  # type: ignore[assignment]
    return scope


def _is_named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name


def _piece(text: str) -> ast.AST:
    """Parse an expression, or a single statement."""
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _nodes(scope: Scope) -> Iterator[ast.AST]:
    # A docstring is no code, and annotations are never evaluated.
    for node in ast.walk(scope):
        if isinstance(node, ast.expr | ast.stmt):
            yield node


def _match(pattern: ast.AST, node: ast.AST) -> dict[str, ast.AST] | None:
    """Return the expressions that the blanks stand for, or None if the node differs from the pattern."""
    blanks: dict[str, ast.AST] = {}
    return blanks if _same(pattern, node, blanks) else None


def _same(pattern: object, node: object, blanks: dict[str, ast.AST]) -> bool:
    if isinstance(pattern, ast.Name) and pattern.id.startswith("__") and isinstance(node, ast.expr):
        # A blank takes the first expression, and the same expression from then on.
        known = blanks.setdefault(pattern.id, node)
        return known is node or ast.dump(known) == ast.dump(node)
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_same(*pair, blanks) for pair in zip(pattern, node, strict=True))
        )
    if isinstance(pattern, ast.AST):
        # The context of a name (read or written) follows from the place, so it is not compared.
        return type(pattern) is type(node) and all(
            _same(getattr(pattern, field), getattr(node, field), blanks)
            for field in pattern._fields
            if field not in ("ctx", "type_comment", "kind")
        )
    return type(pattern) is type(node) and pattern == node


def _filled(replacement: ast.AST, blanks: dict[str, ast.AST]) -> ast.AST:
    """Put the expressions that the blanks stand for into the replacement."""

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
