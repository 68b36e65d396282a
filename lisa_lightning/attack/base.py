"""The interface of attacks: `Attack` changes the user's rows, `RowSelector` and `WeightEdit` need the aligned model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any, Literal

from torch import Tensor

from lisa_lightning.config.requirements import Requirement
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.data.mixing import UserRows
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.runtime.errors import UserError

Similarity = Literal["representation", "gradient"]
"""Property of rows that a selection compares: their hidden states, or the gradients of their losses."""


class Attack:
    """An attack by the user who fine-tunes. Without overrides it changes nothing.

    Subclasses are frozen dataclasses of settings. Prompts of the evaluation are options of the config: the file of an
    attack in conf/attack sets them in section `evaluate`, as it sets the size of the user's data set in `data`.
    """

    @property
    def requirements(self) -> Set[Requirement]:
        """Requirements on the config."""
        return frozenset()

    def check(self, settings: RunSettings, choices: Mapping[str, str]) -> None:
        """Check that the config does not contradict the attack.

        Args:
            settings: the settings of the run.
            choices: config group -> chosen option.

        Raises:
            UserError: if a key that the attack depends on has another value.
        """

    def rows(self, user: UserRows) -> UserRows:
        """Return the rows that the user submits.

        Args:
            user: the rows of `data.n` and `harmful_ratio`. The provider's alignment rows must stay.
        """
        return user


class RowSelector(Attack, ABC):
    """An attack that selects the user's rows by their similarity to harmful rows in the aligned model."""

    by: Similarity = "representation"

    @property
    def requirements(self) -> Set[Requirement]:
        """Passes of the whole model."""
        return frozenset({"whole_model"})

    @abstractmethod
    def candidates(self, rows: Rows) -> list[Row]:
        """Return the harmless rows to select from, in a fixed order."""

    @abstractmethod
    def references(self, rows: Rows) -> list[Row]:
        """Return the harmful rows that the selected rows should resemble."""

    def select(self, similarities: Tensor, count: int) -> list[int]:
        """Return the indices of the most similar candidates, in descending order; of equal ones the first.

        Args:
            similarities: similarity of each candidate to the references, [N].
            count: number of rows to select, at most N.
        """
        return similarities.argsort(descending=True, stable=True)[:count].tolist()


class WeightEdit(Attack, ABC):
    """An attack that edits the weights of the aligned model without training. It replaces fine-tuning."""

    @property
    def requirements(self) -> Set[Requirement]:
        """Passes of the whole model."""
        return frozenset({"whole_model"})

    def check(self, settings: RunSettings, choices: Mapping[str, str]) -> None:
        """Check that nothing in the config works on a training, which does not take place.

        Raises:
            UserError: if something does, or the weights that the edit needs are quantized or not merged.
        """
        choice = f"attack={choices['attack']}"
        for group, option in (("method", "sft"), ("filter", "none")):
            if "finetune" in settings.stages and choices[group] != option:
                raise UserError(
                    f"{choice}: nothing is trained, so that {group}={choices[group]} has no effect. "
                    f"Fix: {group}={option}"
                )
        if "finetune" in settings.stages and settings.lora is None:
            raise UserError(
                f"{choice}: it saves an adapter and trains no weights, so that lora=null has no effect. "
                "Fix: leave lora=null out"
            )
        if settings.model.adapters == "continued":
            raise UserError(f"{choice}: it edits merged weights. Fix: model.adapters=stacked (now continued)")
        if settings.model.quantize is not None:
            raise UserError(f"{choice}: it edits weights that are not quantized. Fix: model.quantize=null")
        if settings.reference is not None:
            raise UserError(
                f"{choice}: its adapter has another rank than lora.r, and repair={choices['repair']} compares it with "
                "a reference of that rank. Fix: choose another repair"
            )

    @abstractmethod
    def prompts(self, rows: Rows) -> tuple[list[Row], list[Row]]:
        """Return the harmful and the harmless requests that the edit looks at.

        Raises:
            UserError: if one of both is empty.
        """

    @abstractmethod
    def layer(self, layers: int) -> int:
        """Return the number of layers, from 1, after which the edit needs hidden states.

        Args:
            layers: number of layers of the model.
        """

    @abstractmethod
    def edit(self, model: Any, harmful: Tensor, harmless: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update B A of each edited matrix: module -> A [r, d_in] and B [d_out, r], all of one rank r.

        Args:
            model: the aligned model. It must stay unchanged.
            harmful: hidden state of the last token of each harmful prompt after `layer`, [N, d].
            harmless: the same of the harmless prompts, [M, d].
        """


def refuse_other_rows(settings: RunSettings, attack: str, count: int, kind: str, harmful_ratio: float) -> None:
    """Raise UserError if the config contradicts the data set of an attack, which sets its size and harmful ratio.

    Args:
        settings: the settings of the run.
        attack: name of the attack.
        count: number of its rows.
        kind: description of its rows in the message.
        harmful_ratio: its share of harmful rows.
    """
    if settings.data.n != count or settings.harmful_ratio != harmful_ratio:
        raise UserError(
            f"attack={attack}: the data set is {count} {kind}, which contradicts data.n={settings.data.n} and "
            f"harmful_ratio={settings.harmful_ratio}. Fix: set attack.count, and leave data.n and harmful_ratio out"
        )
