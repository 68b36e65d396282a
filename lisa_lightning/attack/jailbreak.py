"""Jailbreak: texts around the requests of the evaluation, without any training."""

from collections.abc import Mapping
from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.attack.base import Attack
from lisa_lightning.config.fields import STRICT
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class Jailbreak(Attack):
    """Ask each safety prompt inside a text that sets other objectives against safety (Wei et al., NeurIPS 2023).

    Threat model: the user controls the prompts of the finished model, and neither rows nor weights. The user knows
    nothing about the model. The budget is one attempt of each wrapper for each request.

    conf/attack/jailbreak.yaml has three wrappers as variants of the evaluation. Two have competing objectives, to begin
    willingly and to avoid the words of refusals. One has another style, a fixed format. `~evaluate.variants.NAME`
    leaves one out. The wrappers are ours; they contain nothing harmful. Fine-tuning is unchanged, and so are the rows.
    """

    def check(self, settings: RunSettings, choices: Mapping[str, str]) -> None:
        """Check that an evaluation has a wrapper.

        Raises:
            UserError: if neither `evaluate.wrapper` nor a variant has one.
        """
        options = [{"wrapper": settings.evaluate.wrapper}, *(settings.evaluate.variants or {}).values()]
        if not any(option.get("wrapper") for option in options):
            raise UserError(
                "attack=jailbreak: evaluate.variants has no wrapper. Fix: leave evaluate.variants out, or set "
                "evaluate.variants.NAME.wrapper"
            )
