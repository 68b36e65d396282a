"""The public API: lazy names, the pipeline in this process, models with adapters, scores, and the examples."""

import ast
import json
import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import getbase

import lisa_lightning
from helpers.forking import Forked
from helpers.paths import ROOT
from lisa_lightning import EmbeddedJudge, Pair, RefusalJudge, UserError, Verdict, load_lora_model
from lisa_lightning.evaluation.rates import estimate_rate
from lisa_lightning.model.factors import trainable

SMALL = [
    *("experiment=smoke", "data.n=20", "optim.steps=3", "align.optim.steps=2", "evaluate.every=0"),
    *("source.test.take=2", "source.harmful_prompts.take=2", "source.harmless_prompts.take=1"),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_import_takes_milliseconds_and_imports_no_library() -> None:
    code = (
        "import time, sys; start = time.process_time(); import lisa_lightning; print(time.process_time() - start);"
        "print({'torch', 'hydra', 'lightning', 'transformers'} & sys.modules.keys() or '')"
    )
    runs = [in_a_fresh_process(code).splitlines() for _ in range(6)]  # of which some may meet a busy machine
    assert {libraries for _, libraries in runs} == {""}
    assert min(float(seconds) for seconds, _ in runs) < 0.05


def test_every_public_name_exists_at_run_time_and_for_type_checkers() -> None:
    assert sorted(set(lisa_lightning.__all__)) == sorted(lisa_lightning.__all__)
    assert {*lisa_lightning.__all__} <= {*dir(lisa_lightning)}
    for name in lisa_lightning.__all__:
        value = getattr(lisa_lightning, name)
        assert isinstance(value, str) or callable(value)
    tree = ast.parse(Path(lisa_lightning.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {a.asname for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assigned = {
        t.id for node in block.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    assert {name for name in imported | assigned if name and name[0] != "_"} == {*lisa_lightning.__all__[1:]}
    with pytest.raises(AttributeError, match="has no attribute 'Liza'"):
        _ = lisa_lightning.Liza


@pytest.mark.slow
def test_evaluate_is_a_function_and_a_package_in_any_order_of_imports() -> None:
    orders = ("import lisa_lightning.evaluation.stored", "from lisa_lightning import evaluate")
    for first, second in (orders, orders[::-1]):
        code = f"{first}\n{second}\nprint(callable(evaluate), lisa_lightning.evaluation.stored.__name__)"
        assert in_a_fresh_process(f"import lisa_lightning\n{code}") == "True lisa_lightning.evaluation.stored\n"


@pytest.fixture
def other_app(tmp_path: Path) -> Iterator[None]:
    """Set Hydra's state to that within the task function of another app, for another version of Hydra."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "main.yaml").write_text("answer: 42\n")
    configured = HydraConfig.instance().cfg
    with initialize_config_dir(version_base="1.2", config_dir=str(tmp_path / "conf")):
        HydraConfig.instance().set_config(compose("main", return_hydra_config=True))
        yield
    HydraConfig.instance().cfg = configured


def global_state() -> list[Any]:
    loggers = [logging.getLogger(name) for name in (None, "lisa_lightning", "lightning.pytorch", "transformers")]
    return [
        *(GlobalHydra.instance(), GlobalHydra.instance().hydra, HydraConfig.instance().cfg, str(getbase())),
        *([(logger.level, [*logger.handlers], [*logger.filters]) for logger in loggers], logging.raiseExceptions),
        *([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], [*warnings.filters]),
        *(warnings.showwarning, Path.cwd()),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("other_app")
def test_the_pipeline_runs_twice_within_another_hydra_app_and_leaves_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("LISA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = global_state()
    first = lisa_lightning.run(*SMALL, out="mine")
    assert first == json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert first["train/steps"] == 3
    written = {file.name for file in (tmp_path / "mine").iterdir()}
    assert {"config.yaml", "curves.csv", "report.html", "adapter"} <= written
    assert not {".hydra", "run.log"} & written
    assert "- method.rho=0.5" in _overrides(lisa_lightning.run(*SMALL, "method.rho=0.5"), tmp_path / "outputs")
    assert global_state() == before
    assert compose("main").answer == 42


def _overrides(metrics: dict[str, Any], outputs: Path) -> str:
    """Return the overrides of the only run in its default folder, whose metrics these are."""
    (folder,) = outputs.glob("smoke/*-*-*_*-*-*")
    assert metrics == json.loads((folder / "metrics.json").read_text())
    return (folder / "overrides.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["method=liza"],
        ["methd.rho=1"],
        ["method.rho=-1"],
        ["method=null"],
        ["seed=1,2"],
        ["judge=[embedded"],
        ["source.train.path=absent.csv"],
        ["+method.rate=1"],
    ],
    ids="".join,
)
def test_a_mistake_is_a_user_error_with_the_sentence_of_the_command(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        lisa_lightning.run(*SMALL, *overrides, out="api")
    done = forked.run([*SMALL, *overrides, "hydra.run.dir=command"], tmp_path, {"WANDB_MODE": "disabled"})
    assert done.returncode == 2
    assert done.stderr.strip().endswith(str(error.value))
    assert not (tmp_path / "api").exists()


def test_flags_and_absent_config_folders_are_refused(tmp_path: Path) -> None:
    for flag in ("-m", "--cfg=job"):
        with pytest.raises(UserError, match=f"{flag}: flags of the command are not accepted"):
            lisa_lightning.run(flag, "experiment=smoke")
    with pytest.raises(UserError, match="there is no such folder"):
        lisa_lightning.run("experiment=smoke", config_dir=tmp_path / "absent")


def test_a_users_folder_remains_after_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.rho=-1"):
        lisa_lightning.run("experiment=smoke", "method.rho=-1", out=tmp_path)
    assert tmp_path.exists()


def test_a_folder_of_configs_can_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's = mine"
    (folder / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: tiny\nseed: -3\n"
    (folder / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="seed=-3"):
        lisa_lightning.run("experiment=mine", config_dir=folder)


def test_a_loaded_model_has_a_seeded_adapter_and_names_its_origin(tiny: Path) -> None:
    state = torch.get_rng_state()
    model, tokenizer = load_lora_model(tiny, r=4, alpha=8, target_modules=["q_proj", "v_proj"], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert {name.split(".")[-4] for name in trainable(model)} == {"q_proj", "v_proj"}
    assert model.peft_config["default"].base_model_name_or_path == str(tiny)
    assert tokenizer.eos_token_id == 0
    again, other = (
        trainable(load_lora_model(tiny, r=4, target_modules=["q_proj", "v_proj"], seed=seed)[0]) for seed in (1, 2)
    )
    same = [torch.equal(weight, again[name]) for name, weight in trainable(model).items()]
    different = [torch.equal(weight, other[name]) for name, weight in trainable(model).items() if ".lora_A." in name]
    assert all(same)
    assert not any(different)


def test_a_model_that_cannot_be_loaded_is_a_user_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, match in (("./absent", "no such folder"), ("nobody/absent", "the hub can't be read")):
        with pytest.raises(UserError, match=match):
            load_lora_model(name)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"target_modules": ["query"]}, "the model has no module 'query'"),
        ({"r": 0}, "lora.r=0 is not allowed; it must be a whole number above 0"),
        ({"dropout": 1.0}, "lora.dropout=1.0 is not allowed; it must be a number from 0 to below 1"),
        ({"dtype": "int8"}, "dtype=int8: it must be one of float32"),
    ]
    for settings, match in mistakes:
        with pytest.raises(UserError, match=match):
            load_lora_model(tiny, **settings)


class FirstLetter:
    """A user's judge, which flags answers to prompts that begin with "a" and detects no refusals."""

    metric = "harmful_score"
    version = "1"

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        yield from (Verdict(pair.prompt[0] == "a", 0.5) for pair in pairs)


class Recorder(FirstLetter):
    """The same judge, which keeps what it is given."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        self.pairs.extend(pairs)
        return super().verdicts(pairs)


PROMPTS = ["a first", "a second", "third", "a first"]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_returns_the_scores_of_every_judge_with_intervals(tiny: Path, training: bool) -> None:
    model, tokenizer = load_lora_model(tiny)
    model.train(training)
    judges: list[Any] = [RefusalJudge(), EmbeddedJudge(), FirstLetter()]
    scores = lisa_lightning.evaluate(model, tokenizer, PROMPTS, judges, template="alpaca", max_new_tokens=3)
    assert model.training is training
    parts = ("", "_low", "_high", "_answers")
    rates = ("refusal/refusal_rate", "embedded/harmful_score", "FirstLetter/harmful_score")
    assert list(scores) == [f"{rate}{part}" for rate in rates for part in parts]
    expected = estimate_rate([True, True, False, True], PROMPTS)
    assert [scores[f"FirstLetter/harmful_score{part}"] for part in parts] == [*vars_of(expected)]


def vars_of(rate: Any) -> tuple[float, ...]:
    return rate.value, rate.low, rate.high, rate.answers


@pytest.mark.slow
def test_evaluate_scores_what_the_model_answers(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load_lora_model(tiny)
    first, second = (Recorder() for _ in range(2))
    answers = first.pairs
    scores: Callable[..., dict[str, float]] = lisa_lightning.evaluate
    options = {"template": "alpaca", "max_new_tokens": 5, "batch_size": 2, "cache_dir": tmp_path}
    by_name: dict[str, Any] = {"mine": first, "again": second}
    assert scores(model, tokenizer, PROMPTS, by_name, **options)["mine/harmful_score"] == 75.0
    assert {pair.prompt for pair in answers} == {*PROMPTS}
    ids = tokenizer(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nthird\n\n### Response:",
        return_tensors="pt",
    )
    generated = model.eval().generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    (third,) = {pair.response for pair in answers if pair.prompt == "third"}
    assert third == str(tokenizer.decode(generated, skip_special_tokens=True)).strip()
    answer_count = len(answers)
    scores(model, tokenizer, PROMPTS, by_name, **options)
    assert len(answers) == answer_count  # the verdicts are stored


def test_harmless_prompts_have_an_over_refusal(tiny: Path) -> None:
    model, tokenizer = load_lora_model(tiny)
    options: dict[str, Any] = {"template": "alpaca", "max_new_tokens": 2, "kind": "harmless"}
    scores = lisa_lightning.evaluate(model, tokenizer, ["a", "b"], [RefusalJudge()], **options)
    assert next(iter(scores)) == "refusal/over_refusal"
    assert scores["refusal/over_refusal_answers"] == 2


def test_evaluate_asks_each_prompt_several_times(tiny: Path) -> None:
    model, tokenizer = load_lora_model(tiny)
    judge: Any = Recorder()
    options: dict[str, Any] = {"template": "alpaca", "max_new_tokens": 4, "prefill": "Sure", "samples": 3}
    options |= {"temperature": 2.0, "seed": 5}
    scores = lisa_lightning.evaluate(model, tokenizer, ["a", "b"], {"mine": judge}, **options)
    assert (scores["mine/harmful_score_answers"], scores["mine/harmful_score_at_k_answers"]) == (6, 2)
    assert len({pair.response for pair in judge.pairs}) == 6
    assert all(pair.response.startswith("Sure") for pair in judge.pairs)


def test_prompt_sets_have_scores_of_their_own(tiny: Path) -> None:
    model, tokenizer = load_lora_model(tiny)
    options: dict[str, Any] = {"template": "alpaca", "max_new_tokens": 2}
    sets = {"one": ["a", "b"], "two": ["b", "c", "d"]}
    scores = lisa_lightning.evaluate(model, tokenizer, sets, [RefusalJudge()], **options)
    counts = {name: scores[f"refusal/{name}refusal_rate_answers"] for name in ("", "set/one/", "set/two/")}
    assert counts == {"": 5, "set/one/": 2, "set/two/": 3}


def test_wrong_arguments_of_evaluate_are_user_errors(tiny: Path) -> None:
    model, tokenizer = load_lora_model(tiny)
    refusal: Any = [RefusalJudge()]
    mistakes: list[tuple[Any, Any, dict[str, Any], str]] = [
        ([], refusal, {}, "prompts: it must be a list"),
        ("prompt", refusal, {}, "prompts: it must be a list"),
        ({}, refusal, {}, "prompts: it must be a list"),
        ({"one": ["a"], "two": []}, refusal, {}, "prompts: it must be a list"),
        ({"a/b": ["a"]}, refusal, {}, "prompts: 'a/b' is no name of a set"),
        (["a"], [], {}, "judges: there is none"),
        (["a"], refusal * 2, {}, "two of them have the name refusal"),
        (["a"], {"a/b": refusal[0]}, {}, "is no name"),
        (["a"], refusal, {"template": "vicuna"}, "template=vicuna: it must be one of alpaca"),
        (["a"], refusal, {"kind": "task"}, "kind=task: it must be one of harmful, harmless"),
        (["a"], [EmbeddedJudge()], {"kind": "harmless"}, "kind=harmless: no judge detects refusals"),
        (["a"], refusal, {"samples": 2}, "samples=2, top_p=1.0: at temperature=0 all answers to a prompt are equal"),
        (
            ["a"],
            refusal,
            {"samples": 0},
            "samples=0, temperature=0.0, top_p=1.0: one of them is out of bounds. Fix: samples above 0",
        ),
        (["a"], refusal, {}, "this tokenizer has no chat template"),
    ]
    for prompts, judges, options, match in mistakes:
        with pytest.raises(UserError, match=match):
            lisa_lightning.evaluate(model, tokenizer, prompts, judges, **options)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_runs(example: Path, tiny: Path, tmp_path: Path, forked: Forked) -> None:
    if "trl" in example.stem:
        pytest.importorskip("trl")
    assert len(example.read_text().splitlines()) <= 25
    done = forked.run([str(tiny)], tmp_path, {}, str(example))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout
    if example.stem == "custom_trainer":
        assert "step 12: drift" in printed
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
        (curves,) = tmp_path.glob("logs/*/version_0/metrics.csv")
        assert "proximal/drift" in curves.read_text().partition("\n")[0]
    if example.stem == "evaluate_model":
        assert [line.split()[0] for line in printed.splitlines()][-1] == "refusal/over_refusal"
