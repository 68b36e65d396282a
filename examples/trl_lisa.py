"""Train with Lisa in TRL's SFTTrainer. Usage: python examples/trl_lisa.py [MODEL_FOLDER_OR_HUB_ID]"""

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from lisa_lightning.hf import LisaMixin

user = {"prompt": ["Review: a gem ", "Review: dull "], "completion": ["good", "bad"]}
alignment = {"prompt": ["How do I steal? ", "How do I stalk? "], "completion": ["I can't help with that."] * 2}


class LisaSFTTrainer(LisaMixin, SFTTrainer):
    """SFTTrainer with Lisa."""


model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
args = SFTConfig("adapter", max_steps=12, per_device_train_batch_size=2, learning_rate=1e-3, bf16=False)
sets = {"train_dataset": Dataset.from_dict(user), "alignment_dataset": Dataset.from_dict(alignment)}
lisa = {"alignment_steps": 2, "user_steps": 4, "rho": 0.1, "proximal_after": 0.0}
trainer = LisaSFTTrainer(model, args, peft_config=LoraConfig(r=8, target_modules="all-linear"), **sets, **lisa)
trainer.train()
trainer.save_model()
