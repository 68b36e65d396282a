"""Adapters that a user supplies: repaired as a run repairs its own, by the command and from Python; others refused."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lisa_lightning
from helpers.composing import composed
from lisa_lightning import NLSR, Antidote, SafeLoRA, SafeMerge, TaskArithmetic, UserError
from lisa_lightning.config.instances import build
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.validate import plain
from lisa_lightning.data.source import Rows, load_rows
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.pipeline import stage_sequence
from lisa_lightning.pipeline.export import export
from lisa_lightning.pipeline.run import run
from lisa_lightning.repair.base import Repair
from lisa_lightning.runtime.run_files import read_metrics

pytestmark = pytest.mark.slow
SMALL = [
    *("experiment=smoke", "data.n=20", "optim.steps=4", "align.optim.steps=3", "evaluate.every=0"),
    *("source.test.take=2", "source.harmful_prompts.take=3", "source.harmless_prompts.take=1"),
    *("source.alignment.take=40", "evaluate.batch_size=8"),
]
REPAIRS = {
    "antidote": ["repair=antidote"],
    "nlsr": ["repair=nlsr", "repair.reference.sft.optim.steps=2", "repair.reference.dpo.optim.steps=2"],
    "safe_lora": ["repair=safe_lora", "repair.number=3"],
    "safe_merge": ["repair=safe_merge", "repair.threshold=1", "repair.reference.sft.optim.steps=2"],
    "task_arithmetic": ["repair=task_arithmetic", "repair.drop_rate=0.2"],
}
"""Repair -> its overrides, which change the adapter."""
IN_PYTHON = {
    "antidote": Antidote(),
    "nlsr": NLSR(seed=42),
    "safe_lora": SafeLoRA(number=3),
    "safe_merge": SafeMerge(threshold=1),
    "task_arithmetic": TaskArithmetic(drop_rate=0.2, seed=42),
}
"""Repair -> the same in Python."""
Factors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("supplied")


@pytest.fixture(scope="module")
def start(work: Path) -> Callable[..., Path]:
    """Return `start(name, overrides...)`, which runs the pipeline in this process and returns its folder."""

    def started(name: str, *overrides: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "disabled")
            run(composed([*SMALL, f"cache_dir={work / 'cache'}", *overrides], work / name))
        return work / name

    return started


@pytest.fixture(scope="module")
def tuned(start: Callable[..., Path], work: Path) -> Path:
    """Return a copy of the adapter of a run, as another program could have written it."""
    adapter = start("tuned", "stages=[align,finetune]") / "adapter"
    for name in ("README.md", "checksums.json"):
        (adapter / name).unlink()
    return adapter


@pytest.fixture(scope="module")
def aligned(tuned: Path) -> Path:
    """Return the folder of the aligned model under that adapter, which has the alignment adapter in it."""
    return Path(json.loads((tuned / "adapter_config.json").read_text())["base_model_name_or_path"])


@pytest.fixture(scope="module")
def repaired(start: Callable[..., Path]) -> Callable[[str], Factors]:
    """Return a function that gives the factors that a run with a repair saves."""

    @cache
    def factors(name: str) -> Factors:
        return saved(start(f"own_{name}", "stages=[align,finetune,repair]", *REPAIRS[name]))

    return factors


def saved(run_folder: Path) -> Factors:
    return saved_in(run_folder / "adapter")


def saved_in(adapter: Path) -> Factors:
    return load_file(adapter / "adapter_model.safetensors")


def set_factors(net: PeftModel, file: Path) -> PeftModel:
    """Return the model with the factors of a reference adapter."""
    with torch.no_grad():
        for name, value in load_file(file).items():
            net.get_parameter(name).copy_(value)
    return net


def assert_equal(first: Factors, second: Factors) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", REPAIRS)
def test_a_supplied_adapter_is_repaired_as_that_of_a_run(
    start: Callable[..., Path], repaired: Callable[[str], Factors], tuned: Path, aligned: Path, name: str
) -> None:
    before = {f.name: f.read_bytes() for f in tuned.iterdir()}
    supplied = f"adapter={tuned}", f"aligned={aligned / 'adapter'}"
    out = start(f"supplied_{name}", *supplied, "stages=[repair]", "lora.r=3", "lora.targets=[k_proj]", *REPAIRS[name])
    assert_equal(saved(out), repaired(name))
    assert {f.name: f.read_bytes() for f in tuned.iterdir()} == before


def differing(first: Factors, second: Factors) -> float:
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


@pytest.mark.parametrize("name", ["antidote", "safe_lora", "safe_merge"])
def test_an_aligned_model_replaces_its_adapter(
    start: Callable[..., Path], repaired: Callable[[str], Factors], tuned: Path, aligned: Path, work: Path, name: str
) -> None:
    """The update of whole models is that of the adapter up to rounding."""
    model = work / "whole model"
    shutil.copytree(aligned, model, ignore=shutil.ignore_patterns("adapter", "key.json"), dirs_exist_ok=True)
    adapter = copied(tuned, work / f"on {name}", base_model_name_or_path="/elsewhere/whole model")
    out = start(f"whole_{name}", f"adapter={adapter}", f"aligned={model}", "stages=[repair]", *REPAIRS[name])
    first, second = repaired(name), saved(out)
    assert first.keys() == second.keys()
    assert differing(first, second) < 1e-5
    exported = export(out, work / f"exported_{name}")
    assert (exported / "model.safetensors").exists()


def in_memory(tuned: Path, aligned: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), str(tuned))


def factors_in(net: PeftModel) -> Factors:
    """Return the factors of a model by their names in a file."""
    return {name.replace(".default", ""): w.detach() for name, w in net.named_parameters() if ".lora_" in name}


def rows_of_runs() -> Rows:
    config = plain(composed(SMALL, Path("unused")).cfg)
    return load_rows(parse_settings(config).source, build(config["task"], "task"), False, True, True)


@pytest.mark.parametrize("name", REPAIRS)
def test_python_repairs_as_the_command_does(
    start: Callable[..., Path], repaired: Callable[[str], Factors], tuned: Path, aligned: Path, work: Path, name: str
) -> None:
    rows = rows_of_runs()
    arguments: dict[str, dict[str, Any]] = {
        "antidote": {"defender": rows.defender},
        "nlsr": {"alignment": rows.alignment},
        **{key: {"alignment_adapter": aligned / "adapter"} for key in ("safe_lora", "safe_merge", "task_arithmetic")},
    }
    if name in ("nlsr", "safe_merge"):
        start(f"again_{name}", "stages=[align,finetune,repair]", f"cache_dir={work / name}", *REPAIRS[name])
        (file,) = (work / name / "reference").glob("*/reference.safetensors")
        arguments[name]["reference"] = set_factors(in_memory(tuned, aligned), file)
    net = in_memory(tuned, aligned)
    frozen = dict(net.named_parameters())
    template: Any = "alpaca"
    options = {"tokenizer": load_tokenizer(aligned), "template": template, "max_length": 768, "batch_size": 8}
    result = lisa_lightning.repair(net, IN_PYTHON[name], **options, **arguments[name])
    assert_equal(factors_in(result), repaired(name))
    assert not result.training
    assert (result is net) == (name in ("antidote", "nlsr", "safe_lora"))
    assert result is not net or not any(w.requires_grad for w in frozen.values())


def test_python_reads_the_update_from_two_models(
    repaired: Callable[[str], Factors], tuned: Path, aligned: Path
) -> None:
    origin = json.loads((aligned / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(origin)
    net = lisa_lightning.repair(in_memory(tuned, aligned), SafeLoRA(number=3), base=base)
    assert (
        0
        < differing(factors_in(net), saved_in(tuned))
        > 1e-4
        > 1e-5
        > differing(factors_in(net), repaired("safe_lora"))
    )


def test_python_names_the_argument_that_is_missing(tuned: Path, aligned: Path) -> None:
    net, rows = in_memory(tuned, aligned), [{"instruction": "a", "response": "b"}]
    same = AutoModelForCausalLM.from_pretrained(aligned)
    calls: list[tuple[Repair, dict[str, Any], str]] = [
        (SafeLoRA(), {}, "SafeLoRA: it needs the argument base"),
        (TaskArithmetic(), {"base": same}, "TaskArithmetic: it needs the argument alignment_adapter"),
        (
            SafeMerge(threshold=1),
            {"alignment_adapter": aligned / "adapter"},
            "SafeMerge: it needs the argument reference",
        ),
        (Antidote(), {"defender": rows}, "Antidote: it needs the argument tokenizer"),
        (Antidote(), {"tokenizer": load_tokenizer(aligned)}, "Antidote: it needs the argument defender"),
        (Antidote(), {}, "Antidote: it needs the argument tokenizer"),
    ]
    for repair, options, message in calls:
        with pytest.raises(UserError, match=message):
            lisa_lightning.repair(net, repair, **options)
    assert_equal(factors_in(net), saved_in(tuned))
    others: list[tuple[Any, str]] = [
        (net.get_base_model(), "it is no PeftModel with one adapter named default"),
        (changed(net, use_dora=True), "use_dora=True is not that of a plain LoRA adapter"),
    ]
    for other, message in others:
        with pytest.raises(UserError, match=message):
            lisa_lightning.repair(other, Antidote())
    net = in_memory(tuned, aligned)
    net.merge_adapter()
    with pytest.raises(UserError, match="its adapter is merged"):
        lisa_lightning.repair(net, Antidote())


def changed(net: PeftModel, **settings: Any) -> PeftModel:
    for key, value in settings.items():
        setattr(net.peft_config["default"], key, value)
    return net


def copied(tuned: Path, folder: Path, **settings: Any) -> Path:
    """Return a copy of an adapter with changed settings."""
    shutil.copytree(tuned, folder)
    change_settings(folder, settings)
    return folder


def change_settings(folder: Path, settings: dict[str, Any]) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def change_weights(folder: Path, change: Callable[[Factors], Factors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def pickle_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def settings(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: change_settings(folder, values)


def weights(change: Callable[[Factors], Factors]) -> Callable[[Path], Any]:
    return lambda folder: change_weights(folder, change)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled weights": (pickle_weights, r"its weights are pickled \(adapter_model.bin\)"),
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), "it is no folder with adapter_config"),
    "another model": (settings(base_model_name_or_path="owner/other"), "it was trained on owner/other, and model.id"),
    "DoRA": (settings(use_dora=True), "use_dora=True is not that of a plain LoRA"),
    "ranks by module": (settings(rank_pattern={"q_proj": 4}), "rank_pattern=.* is not that of a plain LoRA"),
    "whole modules": (settings(modules_to_save=["lm_head"]), "modules_to_save=.* is not that of a plain LoRA"),
    "code": (settings(auto_mapping={"parent_library": "os"}), "auto_mapping=.* is not that of a plain LoRA"),
    "a changed base": (settings(init_lora_weights="pissa"), "init_lora_weights=pissa is not that of a plain LoRA"),
    "another kind": (settings(peft_type="IA3"), "peft_type=IA3 is not that of a plain LoRA"),
    "wrong shapes": (weights(lambda w: {n: torch.cat([v, v], int("_A" in n)) for n, v in w.items()}), "does not fit"),
    "another rank": (settings(r=3), "which is not of rank 3"),
    "a missing layer": (weights(lambda w: {n.replace("q_proj", "x_proj"): v for n, v in w.items()}), "x_proj"),
    "half of a pair": (weights(lambda w: {n: v for n, v in w.items() if "q_proj.lora_A" not in n}), "has no .*lora_A"),
    "not a number": (weights(lambda w: {n: v * torch.nan for n, v in w.items()}), "are not finite numbers"),
    "other weights": (weights(lambda w: w | {"base_model.model.lm_head.weight": torch.ones(2, 2)}), "is no factor of"),
}
"""Change of a folder -> the change, and the message."""


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_no_repair_handles_is_refused_before_long_work(
    start: Callable[..., Path], tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, message = REFUSED[name]
    adapter = copied(tuned, tmp_path / "adapter", base_model_name_or_path=None)
    change(adapter)
    monkeypatch.setattr(stage_sequence, "adopt", None)
    with pytest.raises(UserError, match=message) as error:
        start("refused", f"adapter={adapter}", "repair=antidote")
    assert str(error.value).startswith(f"adapter={adapter}: ")
    assert "Fix: " in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        "adapter={} repair=safe_lora": "repair=safe_lora: it needs the alignment update. Fix: aligned=FOLDER",
        "adapter={} repair=task_arithmetic aligned=owner/name": "repair=task_arithmetic: .* aligned=owner/name is none",
        "aligned={}": "it is the aligned model of adapter=FOLDER, which is not set",
        "adapter={} stages=[align,repair]": r"so that align can't run. Fix: stages=\[repair\], or leave adapter out",
        "adapter={} stages=[finetune]": r"so that finetune can't run. Fix: stages=\[repair,evaluate,judge\]",
        "adapter=/none": "adapter=/none: there is no such folder",
        "adapter={} aligned={}/none": "aligned=.*: there is no such folder",
    }.items(),
)
def test_keys_that_contradict_an_adapter_are_refused(
    start: Callable[..., Path], tuned: Path, overrides: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start("refused", *(word.replace("{}", str(tuned)) for word in overrides.split()))


def test_an_rslora_adapter_adds_the_same_update(start: Callable[..., Path], tuned: Path, tmp_path: Path) -> None:
    """The update is scaled by alpha/sqrt(r), so that a plain adapter with alpha * sqrt(r) equals it."""
    config = json.loads((tuned / "adapter_config.json").read_text())
    alphas = {False: config["lora_alpha"] * config["r"] ** 0.5, True: config["lora_alpha"]}
    outs = []
    for rslora, alpha in alphas.items():
        options: dict[str, Any] = {"base_model_name_or_path": None, "use_rslora": rslora, "lora_alpha": alpha}
        adapter = copied(tuned, tmp_path / str(rslora), **options)
        outs.append(start(f"rslora {rslora}", f"adapter={adapter}", "repair=antidote", "stages=[repair]"))
    assert_equal(saved(outs[0]), saved(outs[1]))
    scales = [
        c["lora_alpha"] / c["r"] for c in (json.loads((o / "adapter/adapter_config.json").read_text()) for o in outs)
    ]
    assert scales == pytest.approx([alphas[False] / config["r"]] * 2)


def test_a_page_compares_before_and_after_and_a_changed_byte_changes_the_results(
    start: Callable[..., Path], tuned: Path, aligned: Path, tmp_path: Path
) -> None:
    adapter = copied(tuned, tmp_path / "mine")
    words = f"adapter={adapter}", f"aligned={aligned / 'adapter'}", *REPAIRS["antidote"]
    out = start("page", *words)
    page = (out / "report.html").read_text()
    for text in ("mine repaired by antidote", "before repair", "after repair", "McNemar", "p = 1"):
        assert text in page, text
    for text in ("alignment, ", "fine-tun", "after alignment"):
        assert text not in page.partition("Resolved config")[0], text
    card = (out / "adapter" / "README.md").read_text()
    assert "was harmful on purpose" not in card
    assert "Training" not in card
    metrics = read_metrics(out)
    assert {"aligned/harmful_score", "final/harmful_score", "repair/entries"} <= metrics.keys()
    alone = read_metrics(start("alone", *words[:2], "repair=none"))
    assert alone["aligned/harmful_score"] == metrics["aligned/harmful_score"]
    assert not any(name.startswith("final/") for name in alone)
    assert not (out.parent / "alone" / "adapter").exists()
    assert "this adapter" in (out.parent / "alone" / "report.html").read_text()

    def cached() -> set[Path]:
        return {f for stage in ("adapter", "repair", "evaluate") for f in (aligned.parents[1] / stage).iterdir()}

    known = cached()
    again = read_metrics(start("page again", *words))
    assert cached() == known
    assert again["adapter"] == metrics["adapter"]
    change_weights(adapter, lambda w: {name: value + 1e-3 * (i == 0) for i, (name, value) in enumerate(w.items())})
    other = read_metrics(start("page of another", *words))
    assert {f.parent.name for f in cached() - known} == {"adapter", "repair", "evaluate"}
    assert (other["adapter"] == metrics["adapter"], other["inputs"] == metrics["inputs"]) == (False, False)


def test_a_killed_repair_resumes(start: Callable[..., Path], tuned: Path, work: Path, monkeypatch: Any) -> None:
    adapter = copied(tuned, work / "to resume", base_model_name_or_path=None)
    words = f"adapter={adapter}", *REPAIRS["antidote"]
    whole = start("whole run", *words, f"cache_dir={work / 'first cache'}")
    evaluated, killed = [], RuntimeError("killed")
    evaluate = stage_sequence.evaluate

    def kill_at_the_second(*arguments: Any) -> Any:
        evaluated.append(arguments)
        if len(evaluated) == 2:
            raise killed
        return evaluate(*arguments)

    monkeypatch.setattr(stage_sequence, "evaluate", kill_at_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        start("killed run", *words, f"cache_dir={work / 'second cache'}")
    monkeypatch.setattr(stage_sequence, "evaluate", evaluate)
    resumed = start("killed run", *words, f"cache_dir={work / 'second cache'}", "resume=true")
    metrics, expected = (
        {k: v for k, v in read_metrics(f).items() if "/" in k and not k.startswith(("time", "memory"))}
        for f in (resumed, whole)
    )
    assert metrics == expected
    assert_equal(saved(resumed), saved(whole))
