"""Stage `finetune` of an attack that edits weights: its adapter is computed and not trained. Start at `edit`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lisa_lightning.attack.base import WeightEdit
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.data.templates import encode_prompt
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.model.factors import PREFIX, Factors
from lisa_lightning.model.lora import attach, replace_adapter, save_adapter
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, rows_hash


def edit(
    cache: StageCache,
    models: ModelSource,
    encoder: Encoder,
    fabric: Fabric,
    aligned: Model,
    attack: WeightEdit,
    rows: Rows,
) -> tuple[Model, Metrics]:
    """Return the aligned model with the adapter of the attack, and the cost.

    Rank zero computes the adapter, which is stored in float32.

    Args:
        cache: the cache of stage results.
        models: loads the aligned model.
        encoder: encodes the prompts.
        fabric: the processes of the run.
        aligned: the aligned model, without an adapter of its own.
        attack: the attack.
        rows: all sets of the source.
    """
    harmful, harmless = attack.prompts(rows)
    key = {
        "aligned": aligned.name,
        "attack": class_key(attack),
        "prompts": {"harmful": rows_hash(harmful), "harmless": rows_hash(harmless)},
    }

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            net: Any = models.load(aligned)
            net.to(fabric.device).eval()
            layer = attack.layer(net.config.get_text_config().num_hidden_layers)
            with fabric.autocast():
                states = [last_states(net, encoder, part, layer) for part in (harmful, harmless)]
            updates = attack.edit(net, *states)
            rank = len(next(iter(updates.values()))[0])
            lora = Lora(r=rank, alpha=rank, targets=sorted(updates))
            # The initial factors are replaced, so that their seed has no effect.
            tuned = replace_adapter(attach(net.cpu(), lora, 0, "attack"), _factors(updates))
            save_adapter(tuned, str(aligned.folder), folder / "adapter")
        return {"steps": 0}

    folder, cost = cache.run("finetune", key, make)
    return Model(aligned.folder, folder / "adapter"), cost


@torch.no_grad()
def last_states(model: Any, encoder: Encoder, rows: Sequence[Row], layer: int) -> Tensor:
    """Return the hidden state of each prompt's last token after a layer, [N, d] float32 on the CPU.

    Args:
        model: a causal language model of `transformers` in evaluation mode.
        encoder: has tokenizer and template.
        rows: N rows, whose answers are ignored.
        layer: number of the layer, from 1.
    """
    device = model.get_input_embeddings().weight.device
    states = []
    for row in rows:
        ids = encode_prompt(encoder.tokenizer, encoder.template, row.instruction, row.context, system=row.system)
        outputs = model.get_decoder()(
            input_ids=torch.tensor([ids], device=device), use_cache=False, output_hidden_states=True
        )
        states.append(outputs.hidden_states[layer][0, -1].float().cpu())
    return torch.stack(states)


def _factors(updates: dict[str, tuple[Tensor, Tensor]]) -> Factors:
    """Return the factors of the updates under the names of peft."""
    return {
        f"{PREFIX}{module}.lora_{side}.default.weight": factor.to("cpu", torch.float32)
        for module, pair in updates.items()
        for side, factor in zip("AB", pair, strict=True)
    }
