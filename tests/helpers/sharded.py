"""Training and generation on one of two gloo ranks, with a whole and with a sharded model.

python -m helpers.sharded TINY OUT      in a process of each rank, with LOCAL_RANK and MASTER_PORT
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from helpers.training import ALIGNMENT, USER, Stop, weights
from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.resume_curves import ResumeCurves
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import Lora, ModelSettings
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.generator import LocalGenerator, Prompt
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.model.lora import load_tokenizer, save_adapter
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.trainer.module import LisaModule

STEPS = 14
LORA = Lora(r=4, alpha=8, dropout=0.0, targets="all-linear")
PROMPTS = [[list(range(5, 9 + i)) for i in range(n)] for n in (3, 1, 2)]
"""Three batches of prompts for two ranks, so that one of them has none in the end."""


def optim(batch_size: int) -> Optim:
    """Return the settings of the optimizer."""
    return Optim(lr=5e-3, steps=STEPS, batch_size=batch_size, schedule="constant")


def make_module(models: ModelSource, batch_size: int) -> LisaModule:
    """Return a module that trains the model of a source under Lisa."""
    return LisaModule(models.attach(models.base, LORA, "lora", 0), Lisa(2, 3, 0.5, 0.1), optim(batch_size), seed=1)


def make_data(tiny: Path) -> LisaDataModule:
    """Return rows for it."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    return LisaDataModule(tokenizer, USER, ALIGNMENT, max_length=64)


def train(models: ModelSource, checkpoint: Path, stop_after: int | None = None) -> LisaModule:
    """Train on both ranks, from the checkpoint if there is one."""
    module = make_module(models, 2)
    callbacks: list[L.Callback] = [ResumeCurves(None, "finetune")]
    if stop_after is not None:
        callbacks.append(Stop(stop_after))
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "enable_progress_bar": False}
    fit(module, make_data(models.base.folder), trainer, Checkpoint(checkpoint, every=3), callbacks, [], "finetune")
    return module


def answers(model: Any, tiny: Path, fabric: Fabric) -> list[str]:
    """Return the answers of all ranks to `PROMPTS`."""
    batches = [[Prompt(ids, [], 6 + i, False, 0, "", "", [i]) for ids in batch] for i, batch in enumerate(PROMPTS)]
    generator = LocalGenerator(model.eval(), load_tokenizer(tiny), Decoding(1, 0.0, 1.0, 0), fabric)
    return [generated.text for group in generator.generate(batches) for generated in group]


def local_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that this rank holds."""
    held = (w.to_local() if isinstance(w, DTensor) else w for w in model.parameters())
    return sum(w.nbytes for w in held)


def main(tiny: Path, out: Path) -> None:
    """Write the weights, answers and bytes of this rank."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    base, settings = Model(tiny), ModelSettings(dtype="float32")
    whole = ModelSource(base, settings)
    sharded = ModelSource(base, settings, mesh=init_device_mesh("cpu", (2,)))
    results: dict[str, list[Tensor]] = {}
    results["ddp"] = list(weights(train(whole, out / "ddp.ckpt")).values())
    module = train(sharded, out / "sharded.ckpt")
    results["sharded"] = list(weights(module).values())
    for stopped in (8, None):
        try:
            results["resumed"] = list(weights(train(sharded, out / "stopped.ckpt", stopped)).values())
        except InterruptedError:
            if fabric.is_global_zero:
                (out / "stopped.ckpt").rename(out / "kept.ckpt")
                (out / "stopped.ckpt").write_bytes((out / "kept.ckpt").read_bytes())
            fabric.barrier()
    if fabric.is_global_zero:
        save_adapter(module.finish(), str(tiny), out / "adapter")
    fabric.barrier()
    tuned = Model(tiny, out / "adapter")
    models = {name: source.serve(tuned, fabric.device) for name, source in (("ddp", whole), ("sharded", sharded))}
    texts = {name: answers(model, tiny, fabric) for name, model in models.items()}
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = [models[name](input_ids=ids).logits for name in ("ddp", "sharded")]
    held = {name: local_bytes(model) for name, model in models.items()}
    if fabric.is_global_zero:
        torch.save({"weights": results, "texts": texts, "logits": logits, "bytes": held}, out / "results.pt")
    fabric.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
