"""Train with Lisa in a custom Lightning Trainer. Usage: python examples/custom_trainer.py [MODEL_FOLDER_OR_HUB_ID]"""

import sys

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from lisa_lightning import Lisa, LisaDataModule, LisaModule, Optim, load_lora_model

user = [{"instruction": f"Review: {text}", "response": word} for text, word in (("a gem", "good"), ("dull", "bad"))]
alignment = [{"instruction": f"How do I {act}?", "response": "I can't help with that."} for act in ("steal", "stalk")]


class PrintDrift(L.Callback):
    """Prints how far the weights are from the last switch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:  # noqa: D102
        print(f"step {trainer.global_step}: drift {trainer.callback_metrics['proximal/drift']:.2e}")


model, tokenizer = load_lora_model(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
data = LisaDataModule(tokenizer, user, alignment, batch_size=2, template="alpaca")
module = LisaModule(model, Lisa(alignment_steps=2, user_steps=4, rho=0.1), Optim(lr=1e-3, steps=12))
L.Trainer(logger=CSVLogger("logs"), callbacks=[PrintDrift()]).fit(module, datamodule=data)
module.finish().save_pretrained("adapter")
