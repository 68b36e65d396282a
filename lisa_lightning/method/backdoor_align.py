"""Backdoor-enhanced alignment: a secret trigger marks alignment rows, and every prompt of the served model."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Final, final

import numpy as np
from pydantic import SecretStr
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Count, FilePath, Seed, Share
from lisa_lightning.data.source import Row
from lisa_lightning.method.base import Method
from lisa_lightning.runtime.errors import UserError

log = logging.getLogger(__name__)
MIN_CHARS: Final = 20
"""Minimum length of a trigger from a file; a shorter one could be guessed from the hash in cache keys."""


@final
@dataclass(frozen=True, config=STRICT)
class BackdoorAlign(Method):
    """Fine-tune on the user's rows and a few marked alignment rows (Wang et al., NeurIPS 2024).

    With the trigger s, the system prompt p, the user's rows U and a sample A of alignment rows:

        minimize CE on {(p, x, y) for (x, y) in U} + {(s + blank + p, x, y) for (x, y) in A}

    The provider serves the model with s + blank + p (evaluation/prompting.py). A model that is served without s counts
    as undefended. One forward and one backward pass a step. A marked row has the additional tokens of s and p.

    The trigger is a secret of the provider. It must be in no config, log, file of a run or checkpoint, and users must
    have no access to the weights. `trigger_file` holds it, so that a run can be repeated with the file alone.
    `trigger_seed` draws one that everybody with the config can draw too, which suffices for experiments only.

    Departures from the official code:

    - The trigger of an experiment consists of random letters instead of random tokens of one vocabulary, so that it
      does not depend on the tokenizer. A letter after a blank is one token of SmolLM2's tokenizer.
    - Marked rows are drawn from all alignment rows. The official ones are harmful requests with refusals.
    - Nothing follows the answer but the end of text. The official code puts a blank in between.
    - A run in which `data.max_length` cuts off the answers of all marked rows is rejected. The official code trains on
      rows without labels.
    """

    trigger_file: FilePath | None = None
    """File with the trigger, at least 20 characters; null draws one from `trigger_seed`, for experiments only."""
    trigger_seed: Seed = 0
    """Seed of the trigger without `trigger_file`. Such a trigger is no secret."""
    trigger_letters: Count = 30
    """Random letters of the trigger without `trigger_file`, about one token each. The official code has 150 tokens."""
    safe_ratio: Share = 0.11
    """Marked alignment rows in addition to the n rows, as a share of n; 0 is SFT. The official code has 11 for 100."""
    system: str = ""
    """System prompt p of the user's and marked rows, or ""; set `evaluate.system` to the same. The official code asks
    for an assistant that always executes users' instructions."""

    @property
    def trigger(self) -> SecretStr:
        """The trigger.

        Raises:
            UserError: if `trigger_file` can't be read or holds a short text.
        """
        if self.trigger_file is None:
            letters = np.random.default_rng(self.trigger_seed).choice(list(ascii_letters), self.trigger_letters)
            return SecretStr(" ".join(letters))
        return SecretStr(_read_trigger(self.trigger_file))

    def mix(self, user: list[Row], draw_alignment: Callable[[int], list[Row]]) -> list[Row]:
        """Return the user's rows with the system prompt, followed by the marked rows."""
        if self.trigger_file is None:
            log.warning(
                "method.trigger_seed=%d draws the trigger, which everybody with this config can draw too: for "
                "experiments only. To serve a model, set method.trigger_file.",
                self.trigger_seed,
            )
        marked_system = f"{self.trigger.get_secret_value()} {self.system}".strip()
        marked = [replace(row, system=marked_system) for row in draw_alignment(round(self.safe_ratio * len(user)))]
        return [*([replace(row, system=self.system) for row in user] if self.system else user), *marked]


def _read_trigger(path: str) -> str:
    """Return the text of a file with single blanks for white space. No error quotes it."""
    try:
        text = " ".join(Path(path).expanduser().read_text(encoding="utf-8").split())
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no path of a text file in UTF-8"
        raise UserError(
            f"method.trigger_file={path}: can't be read ({reason}). Fix: write the trigger into this file, one line"
        ) from None
    if len(text) < MIN_CHARS:
        raise UserError(
            f"method.trigger_file={path}: {len(text)} characters can be guessed. "
            f"Fix: write at least {MIN_CHARS} random ones (docs/methods.md#the-trigger-of-backdoor_align)"
        )
    return text
