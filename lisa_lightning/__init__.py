"""Lisa: lazy safety alignment of language models against harmful fine-tuning, on Lightning and Hydra.

Public names are imported on first use, so that `import lisa_lightning` takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lisa_lightning.align import sft as _align_sft
    from lisa_lightning.align.booster import Booster as Booster
    from lisa_lightning.align.lox import LoX as LoX
    from lisa_lightning.align.repnoise import RepNoise as RepNoise
    from lisa_lightning.align.t_vaccine import TVaccine as TVaccine
    from lisa_lightning.align.tar import TAR as TAR
    from lisa_lightning.align.vaccine import Vaccine as Vaccine
    from lisa_lightning.config.optim import Optim as Optim
    from lisa_lightning.data.datamodule import LisaDataModule as LisaDataModule
    from lisa_lightning.data.source import Row as Row
    from lisa_lightning.evaluation.api import evaluate as evaluate
    from lisa_lightning.judge.base import Judge as Judge
    from lisa_lightning.judge.base import Pair as Pair
    from lisa_lightning.judge.base import Verdict as Verdict
    from lisa_lightning.judge.embedded import EmbeddedJudge as EmbeddedJudge
    from lisa_lightning.judge.harmbench import HarmBenchJudge as HarmBenchJudge
    from lisa_lightning.judge.linear import LinearJudge as LinearJudge
    from lisa_lightning.judge.llama_guard import LlamaGuardJudge as LlamaGuardJudge
    from lisa_lightning.judge.moderation import ModerationJudge as ModerationJudge
    from lisa_lightning.judge.openai import OpenAIJudge as OpenAIJudge
    from lisa_lightning.judge.refusal import RefusalJudge as RefusalJudge
    from lisa_lightning.judge.strongreject import StrongRejectJudge as StrongRejectJudge
    from lisa_lightning.judge.strongreject_finetuned import StrongRejectFinetunedJudge as StrongRejectFinetunedJudge
    from lisa_lightning.judge.wildguard import WildGuardJudge as WildGuardJudge
    from lisa_lightning.judge.win_rate import WinRateJudge as WinRateJudge
    from lisa_lightning.method.asft import AsFT as AsFT
    from lisa_lightning.method.backdoor_align import BackdoorAlign as BackdoorAlign
    from lisa_lightning.method.base import Method as Method
    from lisa_lightning.method.bso import BSO as BSO
    from lisa_lightning.method.constrained_sft import ConstrainedSFT as ConstrainedSFT
    from lisa_lightning.method.ewc import EWC as EWC
    from lisa_lightning.method.kl import KL as KL
    from lisa_lightning.method.ldifs import LDIFS as LDIFS
    from lisa_lightning.method.lisa import Lisa as Lisa
    from lisa_lightning.method.proximal import Proximal as Proximal
    from lisa_lightning.method.safegrad import SafeGrad as SafeGrad
    from lisa_lightning.method.salora import SaLoRA as SaLoRA
    from lisa_lightning.method.sbr import SBR as SBR
    from lisa_lightning.method.sft import SFT as SFT
    from lisa_lightning.method.spag import SPAG as SPAG
    from lisa_lightning.method.sppft import SPPFT as SPPFT
    from lisa_lightning.method.vlguard import VLGuard as VLGuard
    from lisa_lightning.method.vlguard_loss import VLGuardLoss as VLGuardLoss
    from lisa_lightning.model.lora import load_lora_model as load_lora_model
    from lisa_lightning.pipeline.api import run as run
    from lisa_lightning.pipeline.export import export as export
    from lisa_lightning.repair._api import repair as repair
    from lisa_lightning.repair.antidote import Antidote as Antidote
    from lisa_lightning.repair.nlsr import NLSR as NLSR
    from lisa_lightning.repair.safe_lora import SafeLoRA as SafeLoRA
    from lisa_lightning.repair.safe_merge import SafeMerge as SafeMerge
    from lisa_lightning.repair.task_arithmetic import TaskArithmetic as TaskArithmetic
    from lisa_lightning.runtime.errors import UserError as UserError
    from lisa_lightning.trainer.module import LisaModule as LisaModule

    AlignmentSFT = _align_sft.SFT

__version__ = "0.1.0"

_MODULES = {
    # Training
    "LisaModule": "trainer.module",
    "LisaDataModule": "data.datamodule",
    "Optim": "config.optim",
    "Row": "data.source",
    "load_lora_model": "model.lora",
    # Defenses of fine-tuning
    "AsFT": "method.asft",
    "BSO": "method.bso",
    "BackdoorAlign": "method.backdoor_align",
    "ConstrainedSFT": "method.constrained_sft",
    "EWC": "method.ewc",
    "KL": "method.kl",
    "LDIFS": "method.ldifs",
    "Lisa": "method.lisa",
    "Method": "method.base",
    "Proximal": "method.proximal",
    "SBR": "method.sbr",
    "SFT": "method.sft",
    "SafeGrad": "method.safegrad",
    "SaLoRA": "method.salora",
    "SPAG": "method.spag",
    "SPPFT": "method.sppft",
    "VLGuard": "method.vlguard",
    "VLGuardLoss": "method.vlguard_loss",
    # Alignment
    "AlignmentSFT": "align.sft",
    "Booster": "align.booster",
    "LoX": "align.lox",
    "RepNoise": "align.repnoise",
    "TAR": "align.tar",
    "TVaccine": "align.t_vaccine",
    "Vaccine": "align.vaccine",
    # Repairs
    "Antidote": "repair.antidote",
    "NLSR": "repair.nlsr",
    "SafeLoRA": "repair.safe_lora",
    "SafeMerge": "repair.safe_merge",
    "TaskArithmetic": "repair.task_arithmetic",
    # Judges
    "EmbeddedJudge": "judge.embedded",
    "HarmBenchJudge": "judge.harmbench",
    "Judge": "judge.base",
    "LinearJudge": "judge.linear",
    "LlamaGuardJudge": "judge.llama_guard",
    "ModerationJudge": "judge.moderation",
    "OpenAIJudge": "judge.openai",
    "Pair": "judge.base",
    "RefusalJudge": "judge.refusal",
    "StrongRejectFinetunedJudge": "judge.strongreject_finetuned",
    "StrongRejectJudge": "judge.strongreject",
    "Verdict": "judge.base",
    "WildGuardJudge": "judge.wildguard",
    "WinRateJudge": "judge.win_rate",
    # Evaluation and the whole pipeline
    "UserError": "runtime.errors",
    "evaluate": "evaluation.api",
    "repair": "repair._api",
    "export": "pipeline.export",
    "run": "pipeline.api",
}
"""Public name -> module of this package that defines it."""
_ALIASES = {"AlignmentSFT": "SFT"}
"""Public name -> name in its module, if it differs."""

__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), _ALIASES.get(name, name))
    # The subpackage `repair` has taken this name by now. It can be called too.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
