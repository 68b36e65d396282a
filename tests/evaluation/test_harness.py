"""Tasks of lm-evaluation-harness on a model: scores equal those from the model's own log-likelihoods."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from helpers.paths import ROOT
from lisa_lightning.config.settings import Evaluate
from lisa_lightning.evaluation import harness as module
from lisa_lightning.evaluation.harness import Harness, load_harness
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.evaluation.utility import utility_scores
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.errors import UserError

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

EXAMPLE = ROOT / "examples" / "lm_eval"
ROWS = [json.loads(line) for line in (EXAMPLE / "arithmetic.jsonl").read_text().splitlines()]


def write_task(folder: Path, name: str = "sums", rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Path:
    """Write a local task of these rows with an accuracy and a Brier score, and return its YAML file."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((EXAMPLE / "arithmetic.yaml").read_text())
    task |= {"task": name, "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    task["metric_list"] = [{"metric": metric} for metric in ("acc", "brier_score")]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task | options))
    return path


def loaded(folder: Path, tasks: Sequence[str] = ("sums",), **options: Any) -> Harness:
    """Return the tasks of a folder."""
    tasks_of_folder = load_harness(Evaluate(lm_eval=[*tasks], lm_eval_folder=str(folder), **options))
    assert tasks_of_folder is not None
    return tasks_of_folder


def probabilities(model: Any, tokenizer: Any, row: dict[str, Any], before: str = "") -> np.ndarray:
    """Return the softmax over the log-likelihoods of a row's choices, each computed alone without padding."""
    sums = []
    for choice in row["choices"]:
        prompt = tokenizer(before + row["question"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{before}{row['question']} {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        sums.append(sum(logs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
    return np.exp(np.array(sums) - np.logaddexp.reduce(sums))


@pytest.mark.parametrize(
    ("options", "system"),
    [({}, ""), ({"lm_eval_limit": 7, "lm_eval_batch_size": 3}, ""), ({"lm_eval_limit": 9}, "Be brief.")],
)
def test_scores_equal_those_of_the_models_log_likelihoods(
    tiny: Path, tmp_path: Path, options: dict[str, Any], system: str
) -> None:
    write_task(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    # Larger logits, so that choices differ.
    model.lm_head.weight.data.mul_(20)
    tasks, prompting = loaded(tmp_path, **options), Prompting("alpaca", system)
    state = torch.get_rng_state()
    results = tasks.evaluate(model, load_tokenizer(tiny), prompting, "32-true", "sums")
    assert torch.equal(torch.get_rng_state(), state)
    measured = {score.metric: score.value for score in utility_scores("final", "sums", results)}
    rows = ROWS[: options.get("lm_eval_limit")]
    chances = [probabilities(model, load_tokenizer(tiny), row, f"{system}\n\n" if system else "") for row in rows]
    hits = [int(chance.argmax()) == row["answer"] for chance, row in zip(chances, rows, strict=True)]
    brier = [
        ((chance - np.eye(len(chance))[row["answer"]]) ** 2).sum() for chance, row in zip(chances, rows, strict=True)
    ]
    assert measured == {"acc": pytest.approx(np.mean(hits)), "brier_score": pytest.approx(np.mean(brier), abs=1e-5)}
    assert 0 < np.mean(hits) < 1


def test_a_result_depends_on_the_folders_files_and_the_rows_elsewhere(tmp_path: Path) -> None:
    folder, rows = tmp_path / "tasks", tmp_path / "rows"
    yaml_file = write_task(rows).rename(tmp_path / "sums.yaml")
    folder.mkdir()
    yaml_file.rename(folder / "sums.yaml")
    keys = [loaded(folder).key("sums")]
    (folder / "note.txt").write_text("a")
    keys.append(loaded(folder).key("sums"))
    with (rows / "sums.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    keys.append(loaded(folder).key("sums"))
    keys.append(loaded(folder, lm_eval_limit=3).key("sums"))
    keys.append(loaded(folder, lm_eval_num_fewshot=3).key("sums"))
    keys.append(loaded(folder, lm_eval_batch_size=3).key("sums"))
    assert len({json.dumps(key) for key in keys}) == len(keys)
    assert loaded(folder).key("sums") == keys[2]
    assert keys[0]["harness"]


def test_an_unknown_task_is_refused_with_similar_names(tmp_path: Path) -> None:
    write_task(tmp_path)
    with pytest.raises(UserError) as refusal:
        loaded(tmp_path, ["sums", "sumz", "gsm9k"])
    assert str(refusal.value).startswith("evaluate.lm_eval=[sumz]: it is no task of lm-evaluation-harness ")
    assert re.search("did you mean .*sums.*[?]", str(refusal.value))
    with pytest.raises(UserError, match=r"evaluate.lm_eval_folder=none: there is no such folder. Fix: "):
        load_harness(Evaluate(lm_eval=["sums"], lm_eval_folder="none"))


def test_a_task_without_its_rows_or_its_metric_is_refused(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    task = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(task | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}}))
    with pytest.raises(UserError, match=r"^evaluate.lm_eval=\[sums\]: the task can't be loaded \(.*none.jsonl"):
        loaded(tmp_path)
    metric = {"metric": "no_such", "hf_evaluate": True, "aggregation": "mean", "higher_is_better": True}
    path.write_text(yaml.safe_dump(task | {"metric_list": [metric]}))
    with pytest.raises(UserError, match=r"^evaluate.lm_eval=\[sums\]: its metric no_such is code of the hub"):
        loaded(tmp_path)
    (tmp_path / "code.py").write_text("from evaluate import load\n\n\nrouge = load('rouge')\n")
    path.write_text(path.read_text() + "doc_to_text: !function code.rouge\n")
    with pytest.raises(UserError, match=r"can't be loaded \(its metric rouge is code of the hub"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"UNSAFE_CODE": True}, "runs code that the model writes"),
        ({"MULTIMODAL": True}, "images or sounds"),
        ({"_metric_fn_list": {"acc": print, "bertscore": None}}, "its metric bertscore is code of the hub"),
    ],
)
def test_a_task_that_runs_code_or_reads_images_is_refused(task: dict[str, Any], reason: str) -> None:
    assert reason in (module._refusal(SimpleNamespace(**task)) or "")
    assert module._refusal(SimpleNamespace()) is None
