"""Alpaca: follow general instructions. No rule can score the answers, so a judge compares them (AlpacaEval)."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

from lisa_lightning.data.source import Row


@final
class Alpaca:
    """Alpaca's instructions, with fields `instruction`, `output` and optionally `input`.

    Answers are saved in the format of alpaca_eval. `judge=win_rate` compares them with the outputs of the rows.
    """

    fields: ClassVar[tuple[str, ...]] = ("instruction", "output")
    optional: ClassVar[tuple[str, ...]] = ("input",)
    stripped: ClassVar[tuple[str, ...]] = ("input", "output")
    may_be_empty: ClassVar[tuple[str, ...]] = ("output",)
    """Fields with empty texts: the published set has 28 empty outputs."""

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return instruction, input and output; the output is learnt, or compared with the model's answer."""
        return Row(str(record["instruction"]), str(record["input"]), str(record["output"]))
