"""Abliterate: remove the direction of refusal from the weights, without any training."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from lisa_lightning.attack.base import WeightEdit
from lisa_lightning.config.fields import STRICT, Count, OpenShare
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.data.templates import join_context
from lisa_lightning.judge.base import Pair
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.model.hooks import attention_blocks, mlp_blocks
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class Abliterate(WeightEdit):
    """Make the weights orthogonal to the direction of refusal r (Arditi et al., NeurIPS 2024).

        r = (mean state of harmful prompts - mean state of harmless prompts), normalized
        W' = W - r rᵀ W

    for every matrix W that writes into the residual stream. The states are those of a prompt's last token after a
    layer. W' is W with a LoRA adapter of rank 1, A = rᵀ W and B = -r. So repairs, export and evaluation work as after
    fine-tuning. One forward pass for each prompt and nothing else.

    Threat model: the user has the weights of the aligned model, some harmful requests and some harmless ones, without
    answers. The user doesn't know the held-out prompts: requests are those of `source.harmful`, and of alignment rows
    with an answer that does not refuse.

    Departures from the paper:

    - The embedding stays, since many models tie it to the unembedding. Biases of the matrices stay too.
    - In a model with a norm behind a block (Gemma 2), the norm's weights can write along r again.
    - One layer is set by `depth`. The paper tries all layers and token positions on a validation set.
    """

    depth: OpenShare = 0.6
    """Share of the layers after which the states are compared."""
    count: Count = 128
    """Prompts of each kind, the first of the source. The paper has 128."""

    def prompts(self, rows: Rows) -> tuple[list[Row], list[Row]]:
        """Return the first harmful rows, and the first alignment rows that do not refuse.

        Raises:
            UserError: if every alignment row refuses.
        """
        harmless = list(islice(_answered(rows.alignment), self.count))
        if not harmless:
            raise UserError(
                "attack=abliterate: every answer of source.alignment refuses, and harmless requests are needed. "
                "Fix: add rows with harmless requests to source.alignment"
            )
        return rows.harmful[: self.count], harmless

    def layer(self, layers: int) -> int:
        """Return the layer at `depth`, but not the last one."""
        return max(1, min(round(self.depth * layers), layers - 1))

    def edit(self, model: Any, harmful: Tensor, harmless: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of rank 1 of each matrix that writes into the residual stream, in float64.

        Raises:
            UserError: if both kinds of prompts have the same mean state, or the model has no such matrices.
        """
        difference = harmful.double().mean(0) - harmless.double().mean(0)
        if not difference.norm() > 0:
            raise UserError(
                "attack=abliterate: harmful and harmless prompts have the same mean state, so that there is no "
                "direction between them. Fix: set another attack.depth or source"
            )
        direction = difference / difference.norm()
        return {name: _removal(matrix.weight, direction) for name, matrix in writing_matrices(model).items()}


def writing_matrices(model: Any) -> dict[str, nn.Linear]:
    """Return the matrices that write into the residual stream by name: the last of each attention and MLP block.

    Raises:
        UserError: if a block has no linear layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    matrices = {}
    for block in (*attention_blocks(model), *mlp_blocks(model)):
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(
                f"attack=abliterate: {type(block).__name__} has no linear layer to edit. Fix: choose another model"
            )
        matrices[names[id(linear[-1])]] = linear[-1]
    return matrices


def _answered(rows: list[Row]) -> Iterator[Row]:
    """Yield the rows whose answer does not refuse."""
    pairs = [Pair(join_context(row.instruction, row.context), row.response) for row in rows]
    for row, verdict in zip(rows, RefusalJudge().verdicts(pairs), strict=True):
        if not verdict.refused:
            yield row


def _removal(weight: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [1, d_in] and B [d_out, 1] whose product removes a unit direction from the outputs of a matrix."""
    direction = direction.to(weight.device)
    return (direction @ weight.detach().to(torch.float64))[None], -direction[:, None]
