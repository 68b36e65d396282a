"""Stage `select`: select the alignment rows that fine-tuning uses, by their prompts and the user's. Start at
`select`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lisa_lightning.data.dpp import DPP
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.evaluation.generate import batches
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, stream_hashes
from lisa_lightning.runtime.files import read_json, write_text


def select(
    cache: StageCache,
    models: ModelSource,
    encoder: Encoder,
    fabric: Fabric,
    aligned: Model,
    selection: DPP,
    rows: Mapping[Stream, Sequence[Row]],
    batch_size: int,
) -> tuple[list[Row], Metrics]:
    """Return the alignment rows that a selection keeps, in their order, and the cost.

    Rank zero computes the embeddings of the aligned model, which fine-tuning starts from.

    Args:
        cache: the cache of stage results.
        models: loads the aligned model.
        encoder: encodes the prompts.
        fabric: the processes of the run.
        aligned: the aligned model.
        selection: the selection.
        rows: alignment rows, and the user's rows as references.
        batch_size: prompts of a forward pass.
    """
    key = {
        "aligned": aligned.name,
        "selection": asdict(selection),
        "rows_together": batch_size,
        "rows": stream_hashes(rows),
    }

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            net = embedding_model(models, fabric, aligned)
            with fabric.autocast():
                candidates, references = (
                    prompt_embeddings(net, encoder, rows[stream], batch_size) for stream in ("alignment", "user")
                )
            write_text(folder / "rows.json", json.dumps({"rows": selection.select(candidates, references)}))
        return {}

    folder, cost = cache.run("select", key, make)
    selected = sorted(read_json(folder / "rows.json", f"delete {folder}")["rows"])
    return [rows["alignment"][i] for i in selected], cost | {"rows/selected": len(selected)}


def embedding_model(models: ModelSource, fabric: Fabric, aligned: Model) -> Any:
    """Return the aligned model on the device, in evaluation mode and with its adapter."""
    net: Any = models.load(aligned, quantize=True)
    if aligned.adapter is not None:
        net = PeftModel.from_pretrained(net, aligned.adapter).get_base_model()
    return net.to(fabric.device).eval()


@torch.no_grad()
def prompt_embeddings(model: Any, encoder: Encoder, rows: Sequence[Row], batch_size: int) -> Tensor:
    """Return the mean of the last hidden states over each prompt's tokens, [N, d] float32 on the CPU.

    A prompt is instruction and context without a template, as in the official code of SPARD.

    Args:
        model: a causal language model of `transformers` in evaluation mode.
        encoder: has the tokenizer, and the number of tokens of a prompt that count.
        rows: N rows.
        batch_size: prompts of a forward pass.
    """
    prompts = [_prompt_ids(encoder, row) for row in rows]
    groups = batches(prompts, batch_size)
    means = torch.cat([_mean_states(model, [prompts[i] for i in group]) for group in groups])
    embeddings = torch.empty_like(means)
    embeddings[[i for group in groups for i in group]] = means
    return embeddings


def _prompt_ids(encoder: Encoder, row: Row) -> list[int]:
    """Return the ids of a prompt; that of the end of text for an empty one."""
    text = f"{row.instruction} {row.context}" if row.context else row.instruction
    ids = first_ids(encoder.tokenizer, text, encoder.max_length)[: encoder.max_length]
    eos: Any = encoder.tokenizer.eos_token_id
    return ids or [eos]


def _mean_states(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean of the hidden states after the final norm, [prompts, d] float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True).to(device)
    # No token attends to the padding, which is on the right.
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return ((states.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).cpu()
