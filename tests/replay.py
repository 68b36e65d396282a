"""Replays golden cases (what the official implementations did, batch by batch) through this project's training loop.

    python tests/replay.py PATH/TO/lisa [PATH/TO/bso ...]

A case is the path of a golden file without its ending. One line a case: name, largest weight error at the end, largest
loss error (the recorded loss includes the penalty), and, where the case records them, largest relative drift error and
whether all states agree. Exit status 1 where an error exceeds 1e-5.
"""

import json
import logging
import math
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Example, pack
from lisa_lightning.methods.method import Method
from lisa_lightning.module import LisaModule, Optim
from lisa_lightning.net import attach, trainable
from lisa_lightning.training import Callback

TOLERANCE = 1e-5
METHODS = Path(__file__).parents[1] / "conf" / "method"


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest absolute errors of a replayed case; drift errors are relative to max(1, drift)."""

    weights: float
    loss: float
    drift: float
    states_agree: bool

    @property
    def passed(self) -> bool:
        """Whether all is within the tolerance."""
        return self.states_agree and all(e <= TOLERANCE for e in (self.weights, self.loss, self.drift))


def replay(case: Path) -> Errors:
    """Run the recorded batches of `case` (a path without its ending) and compare."""
    facts = json.loads(case.with_name(case.name + ".json").read_text())
    tensors = load_file(case.with_name(case.name + ".safetensors"))
    net = _net(facts, tensors)
    total = facts["total_steps"]
    optim = Optim(
        lr=facts["lr"],
        steps=total,
        batch_size=facts["batch_size"],
        accumulate=facts.get("gradient_accumulation_steps", 1),
        clip=facts["max_grad_norm"],
        schedule=facts["lr_scheduler"],
        warmup_ratio=facts["lr_warmup_ratio"],
        weight_decay=facts["weight_decay"],
        betas=tuple(facts["betas"]),
        eps=facts["eps"],
    )
    method = _method(facts)
    module = LisaModule(net, method, optim, seed=facts["seed"], key={})
    steps = [_step(tensors, t, method) for t in range(total)]
    recorder = _Recorder()
    _fit(module, steps, recorder)

    final = {name: weight.detach() for name, weight in trainable(net).items()}
    weights = max(
        float((final[name.removeprefix("final.")] - value).abs().max())
        for name, value in tensors.items()
        if name.startswith("final.")
    )
    wanted = facts["steps"]
    loss = max(
        abs(m["train/loss"] + m["proximal/penalty"] - w["loss"]) for m, w in zip(recorder.seen, wanted, strict=True)
    )
    states = [step.state for step in steps] == [w["state"] for w in wanted if "state" in w]
    return Errors(weights, loss, _drift_error(recorder, facts.get("drifts", [])), states)


def _net(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    sizes = dict(facts["model"])
    theta = sizes.pop("rope_theta", 10000.0)
    config = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": theta})
    model = LlamaForCausalLM(config)
    base = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    model.load_state_dict(base, strict=True)
    lora = facts["lora"]
    net = attach(model, _Lora(lora["r"], lora["alpha"], lora.get("dropout", 0.0), list(lora["targets"])), seed=0)
    initial = {k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")}
    own = trainable(net)
    if own.keys() != initial.keys():
        raise ValueError(f"adapter weights differ: {sorted(own.keys() ^ initial.keys())[:4]}")
    with torch.no_grad():
        for name, value in initial.items():
            own[name].copy_(value)
    return net


@dataclass(frozen=True, slots=True)
class _Lora:
    r: int
    alpha: float
    dropout: float
    targets: list[str]


def _method(facts: dict[str, Any]) -> Method:
    """The method by the case's own name, through conf/method as a run finds it."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(METHODS / f"{facts['method']}.yaml")
    given = {
        "rho": facts["rho"],
        "alignment_steps": facts["alignment_steps"],
        "user_steps": facts["user_steps"],
    }
    return instantiate(cfg, **{k: v for k, v in given.items() if k in cfg})


def _step(tensors: dict[str, Tensor], t: int, method: Method) -> Step:
    state = method.schedule.state(t)
    prefix = f"step{t:03d}.{state}"
    ids, labels, mask = (tensors[f"{prefix}.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    examples = [
        Example(tuple(i[m.bool()].tolist()), tuple(label[m.bool()].tolist()))
        for i, label, m in zip(ids, labels, mask, strict=True)
    ]
    return Step(t, state, [pack(examples)], sum(e.supervised for e in examples))


class _Recorder(Callback):
    """Keeps every step's metrics."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, LisaModule)
        self.seen.append(pl_module.metrics)


def _drift_error(recorder: _Recorder, drifts: list[dict[str, Any]]) -> float:
    wanted = {d["before_step"]: d["drift"] for d in drifts}
    found = {t: m["switch/drift"] for t, m in enumerate(recorder.seen) if "switch/drift" in m}
    if wanted.keys() != found.keys():
        return math.inf
    return max((abs(found[t] - d) / max(1.0, d) for t, d in wanted.items()), default=0.0)


def _fit(module: LisaModule, steps: list[Step], recorder: _Recorder) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[recorder],
        )
        trainer.fit(module, train_dataloaders=DataLoader(steps, batch_size=None))  # type: ignore[arg-type]


def main(cases: list[str]) -> int:
    """Replay and print; 1 where any case fails."""
    failed = not cases
    for case in cases:
        errors = replay(Path(case))
        failed |= not errors.passed
        extra = f"  drift {errors.drift:.1e}" + ("" if errors.states_agree else "  STATES DIFFER")
        print(f"{Path(case).name}  weights {errors.weights:.1e}  loss {errors.loss:.1e}{extra}")
    if not cases:
        print(__doc__, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
