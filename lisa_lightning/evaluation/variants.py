"""Further evaluations of each model under other prompts or decoding: `Variant`."""

from dataclasses import dataclass, replace
from typing import final

from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.evaluator import Evaluator
from lisa_lightning.evaluation.prompting import Prompting


@final
@dataclass(frozen=True)
class Variant:
    """Prompts and decoding of a further evaluation."""

    prompting: Prompting
    decoding: Decoding

    def apply(self, evaluator: Evaluator) -> Evaluator:
        """Return an evaluator with these prompts and this decoding."""
        return replace(evaluator, prompting=self.prompting, decoding=self.decoding)


def asks_task_rows(variant: Evaluator, evaluator: Evaluator) -> bool:
    """Return whether a variant's answers to task rows may differ from those of the run's own evaluation.

    Neither wrapper, prefill nor sampling applies to task rows.

    Args:
        variant: evaluator of the variant.
        evaluator: evaluator of the run's own evaluation.
    """
    return replace(variant.prompting, prefill="", wrapper="") != replace(evaluator.prompting, prefill="", wrapper="")
