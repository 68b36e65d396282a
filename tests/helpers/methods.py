"""Every training-time method with settings that fit the tiny model, and methods that equal a simpler one."""

from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

import pytest

from lisa_lightning.align.booster import Booster
from lisa_lightning.align.lox import LoX
from lisa_lightning.align.repnoise import RepNoise
from lisa_lightning.align.sft import SFT as AlignmentSFT
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.align.tar import TAR
from lisa_lightning.align.vaccine import Vaccine
from lisa_lightning.method.asft import AsFT
from lisa_lightning.method.backdoor_align import BackdoorAlign
from lisa_lightning.method.base import Method
from lisa_lightning.method.constrained_sft import ConstrainedSFT
from lisa_lightning.method.ewc import EWC
from lisa_lightning.method.kl import KL
from lisa_lightning.method.ldifs import LDIFS
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.safegrad import SafeGrad
from lisa_lightning.method.salora import SaLoRA
from lisa_lightning.method.sbr import SBR
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.spag import SPAG
from lisa_lightning.method.sppft import SPPFT
from lisa_lightning.method.vlguard import VLGuard
from lisa_lightning.method.vlguard_loss import VLGuardLoss
from lisa_lightning.repair._dpo import DPO

LAYERS = 2
"""Layers of the tiny model."""
SHORT_ATTACKS = {"inner_steps": 2, "subsample": 1, "attack_lrs": (1e-3, 2e-3), "attack_rows": 3, "held_out_rows": 2}
METHODS: dict[str, Callable[[], Method]] = {
    "sft": SFT,
    "lisa": partial(Lisa, 2, 3, 0.5, 0.1),
    "vlguard": partial(VLGuard, 0.2),
    "backdoor_align": BackdoorAlign,
    "ewc": partial(EWC, 10.0, 2, False),
    "ewc_carrying_over": partial(EWC, 10.0, 2, True),
    "vlguard_loss": partial(VLGuardLoss, 0.5, 2),
    "ldifs": partial(LDIFS, 0.1, None, None, False),
    "ldifs_dropping": partial(LDIFS, 0.1, 0.1, 5.0, False),
    "constrained_sft": partial(ConstrainedSFT, 0.1, 5.0, 20.0, 5),
    "asft": partial(AsFT, 0.1, False),
    "sppft": partial(SPPFT, 0, LAYERS),
    # More directions than the first layer's outputs have.
    "salora": partial(SaLoRA, 6, 4, 5, 6),
    # A threshold between the losses of its first safe steps and those of the later ones.
    "spag": partial(SPAG, 5.35, 0.1, 3.0, 2, None, 4, 0.5),
    "kl": partial(KL, 2.0, "labels"),
    "sbr": partial(SBR, 5.0, 3, False),
    "safegrad": partial(SafeGrad, 1.0, 2),
    "vaccine": partial(Vaccine, 2.0),
    "lox": partial(LoX, 2, 1.0),
    "t_vaccine": partial(TVaccine, 2.0, 1, 3, 4, 0),
    "booster": partial(Booster, 5.0, 0.1, 0.0, False),
    "booster_vaccine": partial(Booster, 5.0, 0.1, 2.0, False),
    "booster_adding_back": partial(Booster, 5.0, 0.1, 0.0, True),
    # A weight at which the noise counts.
    "repnoise": partial(RepNoise, 0.1, 50.0, False, 0),
    "tar": partial(TAR, attacks=2, switch_share=0.5, **SHORT_ATTACKS),
    "dpo": partial(DPO, 0.1),
}
FULL = [
    name
    for name, make in METHODS.items()
    if "adapter" not in make().requirements and type(make()).__module__.startswith("lisa_lightning.method.")
]
"""Methods of fine-tuning that train all weights too."""
ALIKE: dict[str, tuple[Method, Method]] = {
    "ewc": (EWC(0.0, 2, False), SFT()),
    "vlguard_loss": (VLGuardLoss(0.0, 2), SFT()),
    "ldifs": (LDIFS(0.0, 0.1, None, False), SFT()),
    "asft": (AsFT(0.0, False), SFT()),
    "kl": (KL(0.0, "labels"), SFT()),
    "sbr": (SBR(0.0, 3, False), SFT()),
    "vaccine": (Vaccine(0.0), AlignmentSFT()),
    "lox": (LoX(2, 0.0), AlignmentSFT()),
    "booster": (Booster(0.0, 0.1, 0.0, False), AlignmentSFT()),
    "booster_vaccine": (Booster(0.0, 0.1, 2.0, False), Vaccine(2.0)),
    "t_vaccine": (TVaccine(2.0, LAYERS, 3, 4, 0), Vaccine(2.0)),
    "repnoise": (RepNoise(0.0, 0.0, False, 0), AlignmentSFT()),
    "tar": (TAR(grad_scale=0.0, representations=False, **SHORT_ATTACKS), AlignmentSFT()),
}
"""Name -> a method without its term, and the method that it equals then."""


def each(names: Iterable[str], quick: Container[str]) -> list[Any]:
    """Return the names of methods as parameters of a test, marked as slow unless they are in `quick`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
