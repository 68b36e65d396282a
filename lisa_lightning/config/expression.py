"""Arithmetic over metrics, such as `final/accuracy - final/harmful_score`. Start at `parse_expression`."""

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import add, mul, neg, pos, sub, truediv
from typing import Any, Final

from lisa_lightning.config.suggest import suggest
from lisa_lightning.runtime.errors import UserError, printable

MAX_CHARS: Final = 1000
"""Maximum length of an expression."""
BINARY: Final[dict[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}
UNARY: Final[dict[type[ast.unaryop], Callable[[float], float]]] = {ast.UAdd: pos, ast.USub: neg}
FUNCTIONS: Final[dict[str, Callable[..., float]]] = {"min": min, "max": max}
PATH: Final = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.])(?P<path>[A-Za-z_]\w*(/[A-Za-z_]\w*)+)""")
"""Pattern of a quoted name, or of a name with slashes."""
GRAMMAR: Final = (
    "names of metrics such as final/harmful_score, numbers, + - * /, parentheses, min and max; a name with other signs "
    "is quoted"
)


@dataclass(frozen=True)
class Expression:
    """A formula over the metrics of a run, whose syntax has been checked."""

    text: str
    tree: ast.expr

    @property
    def names(self) -> list[str]:
        """Names of the metrics, each once."""
        return list(dict.fromkeys(_names(self.tree)))

    def value(self, metrics: Mapping[str, Any]) -> float:
        """Return the value for the metrics of a run.

        Args:
            metrics: content of metrics.json.

        Raises:
            UserError: if a metric is missing or no number, or the value is not finite.
        """
        self.refuse_unknown(metrics)
        try:
            value = float(_evaluate(self.tree, metrics))
        except ArithmeticError as error:
            raise UserError(f"sweep.value={self.text}: {error}. Fix: another expression") from error
        if not math.isfinite(value):
            raise UserError(f"sweep.value={self.text}: it is {value}. Fix: another expression")
        return value

    def refuse_unknown(self, metrics: Mapping[str, Any]) -> None:
        """Raise UserError for a name that is no metric with a number, and list similar ones."""
        numbers = [name for name, value in metrics.items() if _is_number(value)]
        for name in self.names:
            if name not in numbers:
                raise UserError(f"sweep.value={self.text}: the runs have no metric {name}; {suggest(name, numbers)}")


def parse_expression(text: str) -> Expression:
    """Return an expression after a check of its syntax. Nothing is executed.

    A slash without blanks between words belongs to a name, as in `final/accuracy`. So the division of two metrics
    needs blanks.

    Raises:
        ValueError: if it has anything but metrics, numbers, + - * /, parentheses, min and max.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"it has more than {MAX_CHARS} characters")
    try:
        quoted = PATH.sub(lambda match: repr(match["path"]) if match["path"] else match[0], text.strip())
        tree = ast.parse(quoted, mode="eval").body
        for _ in _names(tree):
            pass
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"it can't be parsed; it may have {GRAMMAR}") from error
    return Expression(printable(text), tree)


def _names(node: ast.expr) -> Iterator[str]:
    """Yield the names of metrics. Raise ValueError for any other node than those of the grammar."""
    if (name := _metric(node)) is not None:
        yield name
        return
    match node:
        case ast.Constant(value=value) if _is_number(value):
            return
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            operands = [operand]
        case ast.BinOp(op=op, left=left, right=right) if type(op) in BINARY:
            operands = [left, right]
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as operands, keywords=[]) if name in FUNCTIONS:
            pass
        case _:
            raise ValueError(f"{printable(ast.unparse(node))[:60]} is not allowed; it may have {GRAMMAR}")
    for operand in operands:
        yield from _names(operand)


def _metric(node: ast.expr) -> str | None:
    """Return the metric that a node names, None for other nodes."""
    match node:
        case ast.Constant(value=str(name)) | ast.Name(id=name):
            return name
    return None


def _evaluate(node: ast.expr, metrics: Mapping[str, Any]) -> float:
    if (name := _metric(node)) is not None:
        return metrics[name]
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](_evaluate(operand, metrics))
        case ast.BinOp(op=op, left=left, right=right):
            return BINARY[type(op)](_evaluate(left, metrics), _evaluate(right, metrics))
        case ast.Call(func=ast.Name(id=name), args=operands):
            return FUNCTIONS[name](*(_evaluate(operand, metrics) for operand in operands))
    raise AssertionError(f"parse_expression accepted {ast.dump(node)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
