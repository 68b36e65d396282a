"""Places of stages' results: another folder as soon as anything changes on which a result depends."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.config.instances import build
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.validate import flat, plain
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.source import Row, Rows, load_rows
from lisa_lightning.pipeline.run import build_defenses, build_prompting, build_variants, make_tools
from lisa_lightning.pipeline.stage_sequence import Inputs, run_stages
from lisa_lightning.pipeline.stages import stage_cache
from lisa_lightning.pipeline.stages.models import Model
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.ranks import OneRank

CHOSEN = (
    *("experiment=smoke", "curate=seal", "align=t_vaccine", "method=lisa", "repair=nlsr"),
    *("evaluate.every=5", "evaluate.temperature=0.5"),
)
ALIGNED = ["curate", "align", "evaluate aligned", "finetune", "reference", "repair", "evaluate final"]
TUNED = ["finetune", "repair", "evaluate final"]
ANSWERED = ["evaluate aligned", "evaluate final"]
PROMPTING = {
    "evaluate.template": "alpaca_newline",
    "evaluate.system": "Be safe.",
    "evaluate.prefix": "xyz",
    "evaluate.prefill": "Sure, here is",
}
"""Key of the evaluation's prompts -> a value that changes them."""
FIRST = {
    "align.seed": ALIGNED,
    "align.lora.r": ALIGNED,
    "data.max_length": ALIGNED,
    "curate.epochs": ["curate"],  # here the same rows come out
    "curate.keep": ALIGNED[1:],
    "align.optim.accumulate": ALIGNED[1:],
    "align.method.rho": ALIGNED[1:],
    **dict.fromkeys(("model.dtype", "model.attention", "model.template", "trainer.precision"), ALIGNED),
    "data.tokenization": ALIGNED,
    **dict.fromkeys(("data.during_alignment", "data.order"), TUNED),
    "lora.r": ["finetune", "reference", "repair", "evaluate final"],
    "method.rho": TUNED,
    "seed": [*TUNED, "evaluate aligned"],  # answers are drawn
    **dict.fromkeys(("evaluate.samples", "evaluate.temperature", "evaluate.top_p"), ANSWERED),
    "harmful_ratio": TUNED,
    "optim.accumulate": TUNED,
    "repair.reference.extrapolation": ["reference", "repair", "evaluate final"],
    "repair.prune_rate": ["repair", "evaluate final"],
    # The curve has the same prompts.
    **{key: [*TUNED, "evaluate aligned"] for key in ("source.harmful_prompts.skip", *PROMPTING)},
}
"""Key -> the stages whose results are made anew."""
VALUES = {
    "model.dtype": "bfloat16",
    "model.attention": "eager",
    "model.template": "alpaca_newline",
    "trainer.precision": "bf16-mixed",
    "data.during_alignment": "discard",
    "data.tokenization": "joined",
    "data.order": "head",
    "evaluate.top_p": 0.5,
    **PROMPTING,
}
"""Key -> another value of it."""
FREE = {
    *("resume", "checkpoint.every", "data.allow_overlap", "data.strip"),
    *("evaluate.lm_eval_batch_size", "evaluate.harmful_threshold", "evaluate.kl_rows", "sweep.retain"),
}
"""Keys of numbers and switches on which no result depends here.

Embedded rows don't overlap, and have no blanks around. There is no task of lm-evaluation-harness. The stage token_kl
has no rows, the threshold only reads curves, and `sweep.retain` is the objective of a search.
"""
ELSEWHERE = ("model.tiny", "trainer", "judge", "task.hub")
"""Beginnings of keys of the model, the processes, the verdicts, and the rows of another source."""

Kept = Callable[[DictConfig], dict[str, str]]


@pytest.fixture
def kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Return a function that gives, for a config, the hash under which each stage's result is kept.

    The stages of its run do nothing.
    """
    found: dict[str, str] = {}
    rows: dict[str, list[Row]] = {}
    loaded_before: dict[str, Rows] = {}

    def built(ranks: object, parent: Path, key: dict[str, Any], make: object) -> Path:
        found[" ".join([parent.name, *([key["name"]] if "name" in key else [])])] = short_hash(key)
        folder = tmp_path / parent.name / short_hash(key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.json").write_text('{"seconds": 0, "peak_mib": 0, "steps": 0}')
        (folder / "scores.json").write_text(json.dumps({"scores": [0] * len(rows["alignment"])}))
        (folder / "changed.json").write_text("{}")
        (folder / "rows.json").write_text('{"rows": [0]}')
        return folder

    def of(cfg: DictConfig) -> dict[str, str]:
        found.clear()
        task = build(plain(cfg.task), "task")
        sets = short_hash([OmegaConf.to_container(cfg.source, resolve=True), cfg.data.allow_overlap, cfg.data.strip])
        if sets not in loaded_before:
            loaded_before[sets] = load_rows(cfg.source, task, cfg.data.allow_overlap, True, cfg.data.strip)
        loaded = loaded_before[sets]
        rows["alignment"] = loaded.alignment
        user = user_rows(loaded, cfg.data.n, cfg.harmful_ratio, cfg.data.order, cfg.seed, 0.0).all
        fabric: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_global_zero=False)
        config = plain(cfg)
        parsed = parse_settings(config)
        prompting = build_prompting(config, parsed)
        variants = build_variants(config, parsed)
        inputs = Inputs(
            parsed, fabric, task, build_defenses(config), config["callbacks"], loaded, user, prompting, variants
        )
        run_stages(inputs, make_tools(inputs, tmp_path, OneRank(), None, Model(tiny), "base"))
        return dict(found)

    monkeypatch.setattr(stage_cache, "build_once", built)
    return of


def other(value: Any) -> Any:
    """Return another number or switch."""
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 or 0.5


@pytest.mark.slow
def test_a_key_that_a_result_depends_on_changes_where_it_is_kept(kept: Kept, config: Callable[..., DictConfig]) -> None:
    cfg = config(*CHOSEN)
    before = kept(cfg)
    assert list(before) == ALIGNED
    changed = {}
    values = {k: v for k, v in flat(plain(cfg)) if not k.startswith(ELSEWHERE)}
    values = {k: other(v) for k, v in values.items() if isinstance(v, bool | int | float)} | VALUES
    for key, value in values.items():
        own = cfg.copy()
        OmegaConf.update(own, key, value)
        after = kept(own)
        changed[key] = [name for name in before if after[name] != before[name]]
    assert {key for key, stages in changed.items() if not stages} == FREE
    assert {key: changed[key] for key in FIRST} == {key: sorted(v, key=list(before).index) for key, v in FIRST.items()}


@pytest.mark.slow
def test_a_selection_depends_on_the_rows_of_both_sides_and_on_its_own_settings(
    kept: Kept, config: Callable[..., DictConfig]
) -> None:
    chosen = ("experiment=smoke", "method=spag", "evaluate.every=0")
    before = kept(config(*chosen))
    tuned = ["select", "finetune", "evaluate final"]
    assert list(before) == ["align", "evaluate aligned", *tuned]
    for key, stages in {
        "harmful_ratio=0.2": tuned,
        "method.safe_ratio=0.1": tuned,
        "method.power=2": tuned,
        "align.seed=7": list(before),
        "method.tau=0.5": tuned[1:],
        "optim.clip=0.5": tuned[1:],
        "lora.r=4": tuned[1:],
    }.items():
        after = kept(config(*chosen, key))
        assert [name for name in before if after[name] != before[name]] == stages, key
    assert "select" not in kept(config(*chosen, "method.safe_ratio=null"))
