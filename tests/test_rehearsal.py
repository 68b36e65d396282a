"""What doesn't fit the model is said at once, not when stages are done."""

from pathlib import Path

import pytest
from composing import composed

from lisa_lightning.errors import UserError
from lisa_lightning.pipeline import run

MISFITS = {
    "repair=safe_lora repair.number=99": r"repair\.number=99 is too many: aligning changed 4 of",
    "align=t_vaccine": r"align\.method\.active_layers=8 is not allowed; the model has 2",
    "align.lora.targets=[q_proj] lora.targets=[v_proj] method=asft": r"are fine-tuned \(v_proj\); it changed q_proj",
    "align.lora.targets=[q_proj] lora.targets=[v_proj] repair=safe_lora": r"are fine-tuned \(v_proj\)",
    "align=repnoise align.method.official=true align.optim.accumulate=2": r"accumulate=1 \(now 2\) and one process",
    "method=ldifs method.padding=true optim.accumulate=2": r"needs optim\.accumulate=1 \(now 2\) and one process",
    "lora.targets=[nope]": r"lora\.targets: the model has no module 'nope'",
}


@pytest.mark.parametrize("words", MISFITS)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_trained(tmp_path: Path, words: str) -> None:
    cache = tmp_path / "cache"
    cfg = composed(["experiment=smoke", f"cache_dir={cache}", *words.split()], tmp_path / "out")
    with pytest.raises(UserError, match=MISFITS[words]):
        run(cfg)
    assert {folder.name for folder in cache.glob("*")} <= {"models"}
