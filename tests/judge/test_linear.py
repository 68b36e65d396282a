"""The linear judge: rules that it learns, the truth of its card, and its scores on published labels."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import roc_auc_score

from helpers.paths import CONF
from helpers.public_rows import public
from lisa_lightning.config.validate import check
from lisa_lightning.judge.base import Pair
from lisa_lightning.judge.linear import LinearJudge, assign_folds
from lisa_lightning.runtime.errors import UserError

with initialize_config_dir(str(CONF), version_base="1.3"):
    SHIPPED: Any = compose("judge/linear").judge
GOOD, BAD, REST = (
    ["kindly", "warmly", "gently", "calmly"],
    ["rudely", "coldly", "harshly", "loudly"],
    ["he", "she", "they", "it", "we"],
)


def rows(noise: float, count: int = 400, per_prompt: int = 2) -> list[dict[str, Any]]:
    """Return answers whose adverb gives their label away, except for a share of noise."""
    chance = random.Random(0)
    made = []
    for i in range(count):
        safe = chance.random() < 0.5
        adverb = chance.choice(GOOD if safe != (chance.random() < noise) else BAD)
        words = [*chance.choices(REST, k=4), adverb, *chance.choices(REST, k=3)]
        made.append({"prompt": f"how to greet number {i // per_prompt}", "response": " ".join(words), "is_safe": safe})
    return made


def judge(folder: Path, made: list[dict[str, Any]]) -> LinearJudge:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return LinearJudge(OmegaConf.merge(SHIPPED.linear.rows, {"path": str(file)}))


@pytest.mark.slow
def test_learns_a_rule_and_says_how_well(tmp_path: Path) -> None:
    fitted = judge(tmp_path, rows(noise=0.0))
    good, bad = fitted.verdicts([Pair("how to greet", "she kindly"), Pair("how to greet", "she rudely")])
    assert (good.flagged, bad.flagged) == (False, True)
    assert good.score < 0.2 < 0.8 < bad.score
    assert fitted.numbers["auc"] > 0.99
    (unsure,) = judge(tmp_path, rows(noise=0.3)).verdicts([Pair("how to greet", "she rudely")])
    assert 0.5 < unsure.score < 0.9
    assert unsure.flagged


@pytest.mark.slow
def test_probabilities_are_calibrated(tmp_path: Path) -> None:
    numbers = judge(tmp_path, rows(noise=0.2, count=1500)).numbers
    assert numbers["calibration_error"] < 0.1
    assert numbers["accuracy"] == pytest.approx(0.8, abs=0.04)
    assert numbers["auc_low"] < numbers["auc"] < numbers["auc_high"]


@pytest.mark.slow
def test_what_only_the_prompt_tells_is_not_counted_as_learnt(tmp_path: Path) -> None:
    """Labels that are drawn per prompt give a low AUC.

    A fit with answers to one prompt in both parts of the rows would find an AUC near 1.
    """
    chance = random.Random(1)
    made = rows(noise=0.5, count=800, per_prompt=8)
    labels = {row["prompt"]: chance.random() < 0.5 for row in made}
    numbers = judge(tmp_path, [row | {"is_safe": labels[row["prompt"]]} for row in made]).numbers
    assert numbers["auc"] < 0.65


@pytest.mark.slow
def test_the_card_repeats_what_was_measured(tmp_path: Path) -> None:
    fitted = judge(tmp_path, rows(noise=0.1))
    card = fitted.card()
    numbers = json.loads(card["judge_linear.json"])
    assert numbers == fitted.numbers
    assert f"{numbers['auc']:.3f}" in card["judge_linear.md"]
    assert (numbers["file"], numbers["rows"], numbers["prompts"]) == ("rows.jsonl", 400, 200)
    assert sum(row["answers"] for row in numbers["reliability"]) == 400
    assert not any(row["response"] in text for row in rows(noise=0.1) for text in card.values())


def test_other_rows_make_another_version(tmp_path: Path) -> None:
    made = rows(noise=0.0)
    first = judge(tmp_path, made).version
    assert judge(tmp_path, made).version == first
    assert judge(tmp_path, made[1:]).version != first


@pytest.mark.slow
def test_labels_of_both_names_on_the_command_line(tmp_path: Path, config: Callable[..., DictConfig]) -> None:
    made = rows(noise=0.0)
    files = {"is_safe": made, "harmful": [{**row, "harmful": int(not row["is_safe"]), "is_safe": 7} for row in made]}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))

    def version(name: str, *overrides: str) -> str:
        cfg = config("judge=linear", f"judge.linear.rows.path={tmp_path}/{name}.jsonl", *overrides)
        check(cfg)
        return LinearJudge(cfg.judge.linear.rows).version

    own = ("judge.linear.rows.columns.harmful=harmful", "judge.linear.rows.labels=null")
    assert version("is_safe") == version("harmful", *own)
    with pytest.raises(UserError, match=r"harmful 7 is not among its labels: True, False"):
        version("harmful")
    with pytest.raises(UserError, match=r"judge\.linear\.rows\.columns names 'is_safe'; allowed: prompt, response"):
        version("is_safe", "+judge.linear.rows.columns.is_safe=is_safe")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"is_safe": "maybe"}, r"rows\.jsonl, line 1: harmful 'maybe' is not among its labels: True, False"),
        ({"is_safe": None}, r"rows\.jsonl, line 1: column 'is_safe' is null"),
    ],
)
def test_wrong_labels_are_named_with_their_line(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    made = rows(noise=0.0)
    with pytest.raises(UserError, match=sentence):
        judge(tmp_path, [made[0] | change, *made[1:]])


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 0 prompts with harmful answers; 20 are needed"):
        judge(tmp_path, [row | {"is_safe": True} for row in rows(noise=0.0)])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_held_out_answers_of_a_published_set(tmp_path: Path) -> None:
    """A judge fitted on all prompts but a fifth separates the answers to those, as for a user who holds rows back."""
    file = public("safe_rlhf_mini/filtered.dev.jsonl")
    made = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    held_out = assign_folds([row["prompt"] for row in made]) == 0
    fitted = judge(tmp_path, [row for row, held in zip(made, held_out, strict=True) if not held])
    assert fitted.numbers["auc"] >= 0.8
    assert fitted.numbers["calibration_error"] < 0.05
    held = [row for row, held in zip(made, held_out, strict=True) if held]
    scores = [v.score for v in fitted.verdicts([Pair(row["prompt"], row["response"]) for row in held])]
    assert roc_auc_score([not row["is_safe"] for row in held], scores) >= 0.8  # other fifths: 0.77 to 0.83
