"""Alpaca: following instructions of all kinds. No rule can tell what is right, so a judge compares (AlpacaEval)."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

from lisa_lightning.data.source import Row


@final
class Alpaca:
    """Fields `instruction`, `output` and, where there is one, `input`.

    The answers are written in alpaca_eval's format; `judge=win_rate` compares them with the rows' own outputs.
    """

    fields: ClassVar[tuple[str, ...]] = ("instruction", "output")
    optional: ClassVar[tuple[str, ...]] = ("input",)
    may_be_empty: ClassVar[tuple[str, ...]] = ("output",)
    """The published set has 28 empty outputs."""

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return the instruction with its input, and the output to learn or to be compared with."""
        return Row(str(record["instruction"]), str(record["input"]).strip(), str(record["output"]).strip())
