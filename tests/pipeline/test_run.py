"""The command itself: files that a run leaves, results that a second run finds, and agreement of two processes."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.forking import Forked
from lisa_lightning.data.files import EMBEDDED
from lisa_lightning.data.templates import encode_prompt
from lisa_lightning.evaluation.generate import Stop, generate
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.model.base_model import base_model
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.runtime.ranks import OneRank

pytestmark = pytest.mark.slow
Run = Callable[..., Path]
CYCLE = ["method.alignment_steps=2", "method.user_steps=4", "optim.steps=24"]
EVERY_STAGE = [
    *("curate=seal", "curate.epochs=1", "source.alignment.take=24", "align=t_vaccine", "align.method.active_layers=1"),
    *("method=vlguard_loss", "repair=nlsr"),
]
IDLE = [["repair=antidote", "repair.dense_ratio=0"]]  # repairs that leave an adapter as it is
IDLE += [["repair=safe_lora", "repair.mode=threshold", "repair.threshold=-1"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> Run:
    """Return `run(name, overrides...)`, which runs an experiment in a fork or by `start` and returns its folder."""
    work = tmp_path_factory.mktemp("run")

    def command(name: str, *overrides: str, cache: str = "cache", start: Any = forked.run, smoke: bool = True) -> Path:
        arguments = [f"experiment={'smoke' if smoke else 'sst2_lisa'}", f"hydra.run.dir={name}", *overrides]
        env = {"LISA_CACHE": str(work / cache), "HOME": str(work)}
        done = start(arguments, work, env)
        assert done.returncode == 0, done.stderr[-3000:]
        (work / name / "terminal.txt").write_text(done.stdout)
        return work / name

    return command


@pytest.fixture(scope="module")
def out(run: Run) -> Path:
    return run("first", *CYCLE)


def test_a_run_leaves_everything_that_is_promised(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    scores = [f"{s}/{n}" for s in ("aligned", "final") for n in ("harmful_score", "accuracy", "over_refusal")]
    assert set(scores) <= metrics.keys()
    assert all(0 <= metrics[name] <= 100 for name in scores)
    assert all(metrics[f"{n}_low"] <= metrics[n] <= metrics[f"{n}_high"] for n in scores)
    assert {"time/align_s", "time/finetune_s", "time/evaluate_s", "time/judge_s"} <= metrics.keys()
    assert metrics["memory/align_mib"] > 100 < metrics["memory/finetune_mib"]  # torch alone holds as much
    assert (metrics["train/steps"], metrics["seed"]) == (24, 42)
    for name in ("config.yaml", "report.html", "checkpoints/finetune.ckpt", "wandb"):
        assert (out / name).exists(), name
    answers = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert {(a["model"], a["kind"]) for a in answers} == {
        (s, k) for s in ("aligned", "final") for k in ("harmful", "harmless", "task")
    }
    assert len(answers) == 2 * (8 + 4 + 8)
    shown = (out / "terminal.txt").read_text()
    assert "harmful score" in shown
    assert "wandb leet" in shown


def test_curves_follow_the_schedule(out: Path) -> None:
    rows = [r for r in read_rows(out / "curves.csv") if r["stage"] == "finetune"]
    assert [int(r["step"]) for r in rows] == list(range(25))
    assert [r["train/state"] for r in rows[1:]] == (["1.0"] * 2 + ["0.0"] * 4) * 4
    assert [int(r["step"]) - 1 for r in rows if r["switch/drift"]] == [2, 6, 8, 12, 14, 18, 20]
    assert [int(r["step"]) for r in rows if r["eval/harmful_score"]] == [0, 12, 24]
    for row in rows[1:]:
        state = "alignment" if row["train/state"] == "1.0" else "user"
        assert row["train/loss"] == row[f"{state}/loss"]
        # The penalty is that of the weights before the step, which at a switch are the anchor itself.
        active = int(row["step"]) - 1 > 0.1 * 24 and not row["switch/drift"]
        assert (float(row["proximal/penalty"]) > 0) == active
        assert float(row["proximal/drift"]) > 0 or row["step"] == "1"  # the warm-up starts from a learning rate of 0


def test_plain_peft_loads_the_adapter_on_the_model_it_names(out: Path) -> None:
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    net = PeftModel.from_pretrained(base, str(out / "adapter"))
    saved = torch.load(out / "checkpoints" / "finetune.ckpt", weights_only=True)["state_dict"]
    for name, value in saved.items():
        assert torch.equal(net.get_parameter(name), value)


def test_offline_wandb_holds_config_and_curves(out: Path) -> None:
    folder = next((out / "wandb").glob("offline-run-*"))
    wandb = str(Path(sys.executable).with_name("wandb"))
    command = [wandb, "leet", "inspect", "--summary", "--json", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("train/loss", "proximal/penalty", "switch/drift", "eval/harmful_score", "final/accuracy"):
        assert name in shown, name
    assert '"rho"' in shown


def test_a_second_run_finds_every_stage_and_another_method_the_aligned_model(run: Run, out: Path) -> None:
    first = json.loads((out / "metrics.json").read_text())
    again = run("again", *CYCLE)
    found = json.loads((again / "metrics.json").read_text())
    own = ("time/total_s", "time/judge_s")
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in first.items() if k not in own}
    assert (again / "curves.csv").read_text() == (out / "curves.csv").read_text()
    assert not (again / "checkpoints").exists()
    few = ("optim.steps=6", "optim.accumulate=2", "lora.dropout=0.2", "evaluate.every=0")
    other, alike = run("sft", "method=sft", *few), run("vlguard", "method=vlguard", "method.safe_ratio=0", *few)
    assert not (other / "checkpoints" / "align.ckpt").exists()
    assert (other / "checkpoints" / "finetune.ckpt").exists()
    adapters = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (other, alike)]
    assert adapters[0] == adapters[1]


def _answers(out: Path) -> list[dict[str, Any]]:
    """Return the answers of a run, without the digest of the model that gave them."""
    lines = (out / "responses.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "origin"} for line in lines]


@pytest.mark.parametrize(
    ("name", "defense", "idle"),
    [
        ("lisa", ["method.alignment_steps=1", "method.user_steps=2"], IDLE[0]),
        ("every stage", EVERY_STAGE, []),
    ],
)
def test_two_processes_equal_one_at_twice_the_batch(
    run: Run, forked: Forked, name: str, defense: list[str], idle: list[str]
) -> None:
    small = ["optim.steps=6", "align.optim.steps=3", "evaluate.every=6", *defense]
    one = run(f"one {name}", *small, "optim.batch_size=4", "align.optim.batch_size=4", cache=f"one {name}")
    halved = ["trainer=ddp", "optim.batch_size=2", "align.optim.batch_size=2", *idle]
    two = run(f"two {name}", *small, *halved, cache=f"two {name}", start=forked.run_ranks)
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert _answers(one) == _answers(two)
    with (one / "curves.csv").open() as x, (two / "curves.csv").open() as y:
        for p, q in zip(csv.DictReader(x), csv.DictReader(y), strict=True):
            assert (p["step"], p["eval/harmful_score"]) == (q["step"], q["eval/harmful_score"])
            if p["train/loss"]:
                assert float(p["train/loss"]) == pytest.approx(float(q["train/loss"]), abs=1e-5)


def test_a_defense_at_every_stage_composes_and_is_cached_stage_by_stage(run: Run) -> None:
    align = ["curate=random", "align=t_vaccine", "align.method.active_layers=2", "optim.steps=4", "evaluate.every=0"]
    whole = run("whole", *align, "method=asft", "repair=antidote")
    bare = run("bare", *align, "method=asft")
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, bare))
    assert a["time/finetune_s"] == b["time/finetune_s"]  # out of the cache
    assert a["rows/curated"] == b["rows/curated"]
    assert {"time/curate_s", "time/repair_s"} <= a.keys()
    repaired, tuned = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, bare))
    pruned = {name: float((w == 0).float().mean()) for name, w in repaired.items()}
    assert all(share > 0.05 for share in pruned.values())
    assert all(torch.equal(w[w != 0], tuned[name][w != 0]) for name, w in repaired.items())
    changed = torch.cat([(w != tuned[name]).flatten() for name, w in repaired.items()]).float().mean()
    assert (a["repair/modules"], a["repair/entries"]) == (len(repaired) // 2, pytest.approx(float(changed)))
    for number, idle in enumerate(IDLE):
        untouched = run(f"idle_{number}", *align, "method=asft", *idle)
        weights = load_file(untouched / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(w, tuned[name]) for name, w in weights.items())
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert all(f"<code>{choice}</code>" in page for choice in ("curate=random", "align=t_vaccine", "repair=antidote"))


def test_stages_can_be_left_out(run: Run) -> None:
    for stages in ("align,evaluate,judge", "evaluate,judge"):  # which need no user rows
        part = run(stages.replace(",", "_"), f"stages=[{stages}]", "data.n=100000")
        metrics = json.loads((part / "metrics.json").read_text())
        assert "aligned/harmful_score" in metrics
        assert not any(name.startswith(("final/", "train/")) for name in metrics)
    run(part.name, "stages=[judge]", "judge=refusal")  # though it has no curves
    assert "Refusal rate" in (part / "report.html").read_text()


def test_a_run_is_judged_anew_without_being_run_anew(run: Run, out: Path) -> None:
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    metrics = json.loads(before["metrics.json"])
    run("first", "stages=[judge]", "judge=refusal")
    found = json.loads((out / "metrics.json").read_text())
    changed = {k for k in metrics if found[k] != metrics[k]} - {"time/judge_s"}
    assert found["judges"] == ["refusal", "embedded"]  # of whom the second gave the harmful score
    by_refusal = {f"{s}/{n}" for s in ("aligned", "final") for n in metrics_of_refusals()}
    assert changed <= {"judges", "judge_versions"} | by_refusal
    assert found["final/embedded/harmful_score"] == metrics["final/harmful_score"]
    assert "final/refusal/refusal_rate" in found
    assert "final/refusal/harmful_score" not in found
    after = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    for name in ("config.yaml", "responses.jsonl", "curves.csv", "choices.json", "overrides.yaml"):
        assert after[name] == before[name], name
    assert b"- optim.steps=24" in after["overrides.yaml"]
    shown = after["report.html"].decode()
    assert all(shown.count(f"{name}<") == 1 for name in ("Harmful score (embedded)", "Refusal rate (refusal)"))
    judged = [json.loads(line) for line in (out / "judged.jsonl").read_text().splitlines()]
    assert {j["judge"] for j in judged} == {"refusal", "embedded"}


def metrics_of_refusals() -> list[str]:
    return [f"{n}{end}" for n in ("refusal_rate", "over_refusal") for end in ("", "_low", "_high", "_answers")]


def test_a_file_of_ones_own_is_judged(run: Run, out: Path) -> None:
    work = out.parent
    said = {"How?": "I can't help with that.", "What?": "Like this: a."}
    lines = [{"prompt": prompt, "response": response} for prompt, response in said.items()]
    (work / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = run("own", "stages=[judge]", "judge=refusal", "responses=own.jsonl")
    judged = [json.loads(line) for line in (own / "judged.jsonl").read_text().splitlines()]
    assert [(j["judge"], j["flagged"], j["prompt"], j["response"]) for j in judged] == [
        ("refusal", False, "How?", said["How?"]),
        ("refusal", True, "What?", said["What?"]),
    ]
    assert all(0 <= j["score"] <= 1 for j in judged)
    metrics = json.loads((own / "metrics.json").read_text())
    assert (metrics["responses/refusal_rate"], metrics["responses/refusal_rate_answers"]) == (50.0, 2)
    assert not (own / "adapter").exists()


def test_the_linear_judge_leaves_its_card_beside_its_verdicts(run: Run, out: Path) -> None:
    labelled = [
        {"prompt": f"{i} {word}?", "response": f"{word} it is, {i}", "harmful": word == "bad"}
        for i in range(30)
        for word in ("good", "bad")
    ]
    (out.parent / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    asked = ["stages=[judge]", "judge=linear", "responses=labelled.jsonl"]
    rows = ["path=labelled.jsonl", "columns.harmful=harmful", "labels=null"]
    linear = run("linear", *asked, *(f"judge.linear.rows.{r}" for r in rows))
    card = json.loads((linear / "judge_linear.json").read_text())
    assert (card["rows"], card["share_harmful"]) == (60, 0.5)
    assert "area under the ROC curve" in (linear / "judge_linear.md").read_text()
    assert json.loads((linear / "metrics.json").read_text())["responses/harmful_score_answers"] == 60


def test_an_adapter_that_goes_on_is_the_one_of_alignment(run: Run, out: Path) -> None:
    folder = run("continued", "model.adapters=continued", "optim.steps=3", "evaluate.every=0", "lora.r=4")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16  # align.lora's, not lora's
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"aligned/harmful_score", "final/harmful_score"} <= metrics.keys()
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    assert PeftModel.from_pretrained(base, str(folder / "adapter")).active_adapter == "default"


@pytest.fixture(scope="module")
def real(run: Run) -> Path:
    """Return the folder of a run of the real model, converted from its wheel, with a few steps and a few answers."""
    small = ["source.test.take=2", "source.harmful_prompts.take=2", "source.harmless_prompts.take=1"]
    steps = [
        "align.optim.steps=2",
        "optim.steps=6",
        "optim.batch_size=2",
        "align.optim.batch_size=2",
        "data.n=40",
        "data.max_length=96",
    ]
    short = [
        "evaluate.every=0",
        "evaluate.max_new_tokens=3",
        "task.max_new_tokens=3",
        "method.alignment_steps=1",
        "method.user_steps=2",
    ]
    return run("real", *small, *steps, *short, cache="real-cache", smoke=False)


def test_the_embedded_model_runs_end_to_end(real: Path) -> None:
    """The embedded model runs end to end, with a loss that falls from the first step."""
    metrics = json.loads((real / "metrics.json").read_text())
    assert 0 <= metrics["final/accuracy"] <= 100
    user = [float(r["user/loss"]) for r in read_rows(real / "curves.csv") if r.get("user/loss")]
    assert user[-1] < user[0] - 1
    config = json.loads((real / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (8, ["q_proj", "v_proj"])


def test_answers_of_the_embedded_model_are_those_of_one_prompt_at_a_time(
    real: Path, config: Callable[..., DictConfig]
) -> None:
    """Answers in a batch equal those of one prompt at a time on at least 99 % of tokens.

    They differ only where two tokens are almost equally likely.
    """
    folder, _ = base_model(OneRank(), config("model=smollm2_135m").model, real.parent / "real-cache")
    model, tokenizer = load(folder, "float32").eval(), load_tokenizer(folder)
    asked = [json.loads(line)["prompt"] for line in (EMBEDDED / "harmless_prompts.jsonl").read_text().splitlines()[:6]]
    prompts = [encode_prompt(tokenizer, "alpaca", prompt) for prompt in asked]
    library: Any = model  # its stubs know no batch of ids
    same = total = 0
    for prompt, answer in zip(prompts, generate(model, prompts, 20, Stop(tokenizer, model)), strict=True):
        ids = torch.tensor([prompt])
        alone = library.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0]
        alone = alone[len(prompt) :].tolist()[: len(answer)]
        equal = [x == y for x, y in zip(alone, answer, strict=True)]
        same, total = same + sum(equal), total + len(equal)
        if not all(equal):
            with torch.no_grad():
                first, second = library(torch.tensor([prompt + answer[: equal.index(False)]])).logits[0, -1].topk(2)[0]
            assert first - second < 1e-3
    assert total > 60
    assert same >= 0.99 * total
