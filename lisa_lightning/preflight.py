"""The defenses tried on the model's shape alone: what doesn't fit it is refused before anything long begins."""

from copy import deepcopy
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_lightning.alignment_delta import Delta
from lisa_lightning.base_model import loading
from lisa_lightning.method.method import Method
from lisa_lightning.net import attach, modules, trainable
from lisa_lightning.passes import Passes
from lisa_lightning.repair.repair import Repair


def rehearse(base: Path, cfg: DictConfig, align: Method | None, method: Method | None, repair: Repair | None) -> None:
    """Attach the adapters to a model without weights, and let the defenses find there what they need.

    Args:
        base: the folder of the base model.
        cfg: the whole config.
        align, method, repair: the defenses of the stages that run; they remain as they are.

    Raises:
        UserError: the model lacks what an adapter or a defense is about.
    """
    deltas: dict[str, Delta] = {}
    if align is not None:
        net = _net(base, cfg, "align.lora")
        _prepared(align, net, {})
        deltas = dict.fromkeys(modules(trainable(net)), Delta(torch.ones(1, 1)))
    if method is not None:
        continued = align is not None and cfg.model.adapters == "continued"
        net = _net(base, cfg, "align.lora" if continued else "lora")
        _prepared(method, net, deltas)
        if repair is not None:
            repair.refuse(net, deltas)


def _net(base: Path, cfg: DictConfig, key: str) -> PeftModel:
    with loading(f"The model in {base}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return attach(model.requires_grad_(False), OmegaConf.select(cfg, key), 0, key)


def _prepared(method: Method, net: PeftModel, deltas: dict[str, Delta]) -> None:
    deepcopy(method).prepare(Passes(net, lambda stream, size: iter(()), lambda: deltas))
