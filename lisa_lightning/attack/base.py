"""The interface of attacks: `Attack` changes the user's rows, `RowSelector` and `WeightEdit` need the aligned model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lisa_lightning.config.settings import RunSettings
from lisa_lightning.data.mixing import UserRows
from lisa_lightning.data.source import Row, Rows


class Attack:
    """An attack by the user who fine-tunes. Without overrides it changes nothing.

    Subclasses are frozen dataclasses of settings. Prompts of the evaluation are options of the config: the file of an
    attack in conf/attack sets them in section `evaluate`, as it sets the size of the user's data set in `data`.
    """

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


class RowSelector(Attack):
    """An attack that selects the user's rows by their representations in the aligned model."""

    def candidates(self, rows: Rows) -> list[Row]:
        """Return the harmless rows to select from, in a fixed order.

        Raises:
            UserError: if they are too few.
        """
        raise NotImplementedError

    def references(self, rows: Rows) -> list[Row]:
        """Return the harmful rows that the selected rows should resemble."""
        raise NotImplementedError

    def select(self, candidates: Tensor, references: Tensor) -> list[int]:
        """Return the indices of the selected candidates.

        Args:
            candidates: representation of each candidate, [N, d].
            references: representation of each reference, [M, d].
        """
        raise NotImplementedError


class WeightEdit(Attack):
    """An attack that edits the weights of the aligned model without training. It replaces fine-tuning."""

    def prompts(self, rows: Rows) -> tuple[list[Row], list[Row]]:
        """Return the harmful and the harmless requests that the edit looks at.

        Raises:
            UserError: if one of both is empty.
        """
        raise NotImplementedError

    def edit(
        self, model: Any, states: Callable[[Sequence[Row], int], Iterator[Tensor]], rows: tuple[list[Row], list[Row]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update B A of each edited matrix: module -> A [r, d_in] and B [d_out, r], all of one rank r.

        Args:
            model: the aligned model in evaluation mode.
            states: yields, for requests and the index of a layer, the hidden state [d] of each prompt's last token
                after that layer.
            rows: what `prompts` returns.
        """
        raise NotImplementedError
