"""Adapters that leave their machine: the card next to them, and models merged for plain transformers."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.damage import flip
from helpers.forking import Forked, run, started
from helpers.hub_server import Upload
from helpers.paths import ROOT
from helpers.serving import serving
from lisa_lightning import export
from lisa_lightning.report.model_card import TERMS, merged_card, read_terms
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.run_files import read_metrics

SHORT = ("experiment=smoke", "optim.steps=4", "optim.lr=3e-2", "align.optim.steps=2", "evaluate.every=0")
RUNS = {
    "stacked": (),
    "continued": ("model.adapters=continued",),
    "repaired": ("repair=antidote",),
    "half": ("model.dtype=bfloat16", "align=none", "stages=[finetune]"),
}
"""Name of a run -> its overrides."""
TEXT = "Is the tea hot? Tschüß."
LOGITS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(sys.argv[1], return_tensors="pt")
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = net(**batch).logits[0].float().tolist()
    print(json.dumps({"ids": batch["input_ids"][0].tolist(), "dtype": str(net.dtype), "logits": logits}))
"""
"""Program that prints ids, data type and logits of each model in a folder, without this package."""


@pytest.fixture(scope="module")
def work(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs and of their cache."""
    folder = tmp_path_factory.mktemp("exports")
    for name, overrides in RUNS.items():
        done = run(forked, folder, *SHORT, *overrides, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def card_data(card: str) -> Any:
    """Return the front matter of a card as the hub reads it."""
    return ModelCard(card).data


@pytest.fixture
def folder(work: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run without seals, since whoever makes a folder can leave them out."""
    copy = Path(shutil.copytree(work / "stacked", tmp_path / "run"))
    for seal in copy.rglob("checksums.json"):
        seal.unlink()
    return copy


def adapter_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change settings of the adapter in a run's folder, and return all of them."""
    path = folder / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    if changes:
        path.write_text(json.dumps(settings | changes))
    return settings


@pytest.mark.slow
def test_an_exported_model_is_the_adapter_on_its_model(forked: Forked, work: Path, tmp_path: Path) -> None:
    """An exported model gives the logits of the adapter on its model.

    The process that loads it knows neither this package nor its cache, and reads copies that were moved.
    """
    for name in RUNS:
        done = run(forked, work, "export", name, str(tmp_path / f"{name}.made"))
        assert done.returncode == 0, done.stderr
        shutil.move(tmp_path / f"{name}.made", tmp_path / name)
    assert not list(tmp_path.glob("*.part*"))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LISA", "HF_"))} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOGITS, TEXT, *RUNS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    for name, line in zip(RUNS, done.stdout.splitlines(), strict=True):
        exported = json.loads(line)
        adapter = work / name / "adapter"
        base = adapter_config(work / name)["base_model_name_or_path"]
        net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
        batch = AutoTokenizer.from_pretrained(adapter)(TEXT, return_tensors="pt")
        dtype = "torch.bfloat16" if name == "half" else "torch.float32"
        assert (exported["ids"], exported["dtype"]) == (batch["input_ids"][0].tolist(), dtype)
        with torch.no_grad():
            logits, bare = net(**batch).logits[0].float(), None
            with net.disable_adapter():
                bare = net(**batch).logits[0].float()
        tolerance = 1e-5 if name != "half" else 0.05
        assert torch.allclose(torch.tensor(exported["logits"]), logits, atol=tolerance, rtol=0)
        if name != "half":
            assert (logits - bare).abs().max() > 100 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_card_parses_and_holds_the_scores_judges_and_settings(work: Path, name: str) -> None:
    metrics = read_metrics(work / name)
    text = (work / name / "adapter" / "README.md").read_text(encoding="utf-8")
    for card, library in ((text, "peft"), (merged_card(work / name, metrics), "transformers")):
        data = card_data(card)
        assert data.library_name == library
        scores = {result.metric_type: result.metric_value for result in data.eval_results or []}
        assert scores == {score: metrics[f"final/{score}"] for score in scores}
        assert ("harmful_score" in scores) == ("judge" in metrics_stages(work / name))
        assert f"{metrics['final/harmful_score']:.1f}" in card if scores else "No judge has scored" in card
        assert "lora" in (data.tags or [])
        assert "Warning" in card
        assert "10 % of the 60 rows" in card
        block = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
        assert block["optim"]["steps"] == 4
        assert not {"cache_dir", "wandb"} & block.keys()
    assert ("belongs on the aligned model" in text) == (name in ("stacked", "repaired"))


def metrics_stages(folder: Path) -> list[str]:
    return yaml.safe_load((folder / "config.yaml").read_text())["stages"]


@pytest.mark.slow
def test_another_judge_enters_the_card_and_the_exported_one(forked: Forked, work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work / "stacked", tmp_path / "run"))
    done = run(forked, tmp_path, "stages=[judge]", "judge=refusal", f"hydra.run.dir={copy}")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(copy)
    out = export(copy, tmp_path / "out")
    for card in (copy / "adapter" / "README.md", out / "README.md"):
        text = card.read_text(encoding="utf-8")
        names = {result.metric_name for result in card_data(text).eval_results or []}
        assert {"Refusal rate (refusal), percent", "Harmful score (embedded), percent"} <= names
        assert "Refusal rate (embedded), percent" not in names
        low, high = (metrics[f"final/refusal/refusal_rate_{end}"] for end in ("low", "high"))
        assert f"| Refusal rate | refusal | after fine-tuning | {metrics['final/refusal_rate']:.1f} |" in text
        assert f"| {low:.1f} to {high:.1f} | {metrics['final/refusal/refusal_rate_answers']} |" in text


def plant_module(folder: Path) -> None:
    """Plant a module whose name peft imports."""
    (folder / "planted.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'PWNED')!r}).touch()\n")
    adapter_config(folder, megatron_config={"x": 1}, megatron_core="planted")


def plant_pickle(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter" / "adapter_model.bin")
    weights.unlink()


def plant_link(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.rename(folder / "elsewhere.safetensors")
    weights.symlink_to(folder / "elsewhere.safetensors")


def plant_private_model(folder: Path) -> None:
    """Name as base another model of this machine, which looks like a result of the cache."""
    base = Path(adapter_config(folder)["base_model_name_or_path"])
    private = folder.parent / "align" / "0123456789abcdef"
    shutil.copytree(base, private)
    adapter_config(folder, base_model_name_or_path=str(private))


def damage_base(folder: Path) -> None:
    base = Path(adapter_config(folder)["base_model_name_or_path"])
    copy = Path(shutil.copytree(base, folder.parent / "align" / base.name))
    flip(copy / "model.safetensors", 0.9)
    adapter_config(folder, base_model_name_or_path=str(copy))


def scale_weights(folder: Path, keep: Callable[[str], bool] = bool) -> None:
    """Keep some of the adapter's weights, under names that no layer has."""
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "x_proj"): w for name, w in load_file(path).items() if keep(name)}, path)


def change_yaml(folder: Path, **changes: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"].update(changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def unfinish(folder: Path) -> None:
    metrics = read_metrics(folder)
    del metrics["time/total_s"]
    (folder / "metrics.json").write_text(json.dumps(metrics))


def base(path: str) -> Callable[[Path], Any]:
    return lambda folder: adapter_config(folder, base_model_name_or_path=path)


REFUSED: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "no run": (lambda folder: (folder / "config.yaml").unlink(), "holds no run"),
    "unfinished": (unfinish, "is not finished. Fix: repeat the run's command with resume=true"),
    "no adapter": (lambda folder: shutil.rmtree(folder / "adapter"), "has no adapter"),
    "pickled weights": (plant_pickle, "has no adapter"),
    "a link": (plant_link, "has no adapter"),
    "a module to import": (plant_module, "megatron_config=.* is not that of a plain LoRA adapter"),
    "another kind": (lambda folder: adapter_config(folder, use_dora=True), "use_dora=True is not"),
    "an unknown key": (lambda folder: adapter_config(folder, evil="x"), "evil=x is not"),
    "a huge rank": (lambda folder: adapter_config(folder, r=10**9), "which is not of rank 1000000000"),
    "no number": (lambda folder: adapter_config(folder, lora_alpha=None), "lora_alpha=None is not"),
    "weights of no layer": (scale_weights, "can't be loaded|does not fit its model"),
    "half of the weights": (
        lambda folder: scale_weights(folder, lambda name: "v_proj.lora_A" in name),
        "q_proj.lora_A.weight|x_proj.lora_A.weight|v_proj.lora_A.weight has no ",
    ),
    "broken weights": (
        lambda folder: (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 99),
        "can't be loaded",
    ),
    "a data type": (lambda folder: change_yaml(folder, dtype="float8"), r"model.dtype=float8 is not one of"),
    "a hub id": (base("owner/name"), "is no model of a cache"),
    "a folder of the system": (base("/etc"), "is no model of a cache"),
    "a relative path": (base("../../cache/align"), "is no model of a cache"),
    "a long path": (base("/" + "x" * 5000), "is no model of a cache"),
    "a NUL": (base("/tmp/\0"), "is no model of a cache"),
    "a private model": (plant_private_model, "is no model of a cache"),
    "a damaged model": (damage_base, "is damaged"),
}
"""Name of a change -> the change, and the message."""


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_intact_run_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, message = REFUSED[name]
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("LISA_CACHE", str(tmp_path / "no-cache"))
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        export(folder, tmp_path / "out")
    assert "Fix: " in str(error.value) or "can't be loaded" in str(error.value) or "fit" in str(error.value)
    assert not list(tmp_path.glob("out*"))
    assert not (folder / "PWNED").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_a_changed_file_of_a_sealed_run_is_refused(work: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(work / "stacked", tmp_path / "run"))
    flip(copy / name, 0.9)
    with pytest.raises(UserError, match=r"has changed since the run.* Fix: "):
        export(copy, tmp_path / "out")


@pytest.mark.slow
def test_only_a_new_or_empty_folder_is_written_and_all_of_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("full", "file", "link"):
        with pytest.raises(UserError, match="is no empty folder"):
            export(folder, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A limit on the size of files stands in for a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(UserError, match="out can't be written"):
            export(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert (export(folder, tmp_path / "empty") / "model.safetensors").exists()


@pytest.mark.slow
def test_a_model_that_left_the_cache_is_made_again_or_found_where_the_cache_moved(
    forked: Forked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*SHORT, "hydra.run.dir=run"]
    assert run(forked, tmp_path, *command).returncode == 0
    shutil.rmtree(tmp_path / "cache" / "align")
    done = run(forked, tmp_path, "export", "run", "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "Fix: repeat the run's command with resume=true" in done.stderr
    assert run(forked, tmp_path, *command, "resume=true").returncode == 0
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("LISA_CACHE", str(tmp_path / "moved"))
    assert (export(tmp_path / "run", tmp_path / "out") / "config.json").exists()


@pytest.mark.slow
def test_an_upload_is_private_and_a_refused_one_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", Upload.token)
    with serving(Upload) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        out = export(folder, tmp_path / "out", push_to_hub="owner/model")
        assert (Upload.created["organization"], Upload.created["name"]) == ("owner", "model")
        assert Upload.created.get("visibility", Upload.created.get("private")) in ("private", True)
        assert Upload.files == {file.name: file.read_bytes() for file in out.iterdir()}
        monkeypatch.setattr(Upload, "is_private", False)
        with pytest.raises(UserError, match="the repository is public"):
            export(folder, tmp_path / "public", push_to_hub="owner/model")
        monkeypatch.setenv("HF_TOKEN", "hf_WRONG")
        with pytest.raises(UserError, match=r"the hub can't be written .* Fix: log in") as error:
            export(folder, tmp_path / "unknown", push_to_hub="owner/model")
    assert "hf_WRONG" not in str(error.value)
    assert (tmp_path / "unknown" / "model.safetensors").exists()
    for repository in ("a/b/c", "owner/na me", ""):
        with pytest.raises(UserError, match="it is no hub id"):
            export(folder, tmp_path / "never", push_to_hub=repository)
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_the_command_explains_itself_and_respects_offline_mode(forked: Forked, work: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    shown = started(["export", "--help"], work, {}).stdout
    assert "--push-to-hub" in shown
    command = [sys.executable, str(ROOT / "run.py"), "export", "stacked", out, "--push-to-hub", "owner/name"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "forbids uploads" in done.stderr, len(done.stderr.splitlines())) == (2, True, 1)
    assert run(forked, work, "export", "stacked").returncode == 2
    assert not (tmp_path / "out").exists()


HOSTILE = "a|b <script>x()</script> `</b>` ![i](http://e) \n---\n```\n<img src=x> [l](javascript:x) | \x1b[0m\u202e $x$"


def test_nothing_in_a_foreign_folder_becomes_markup_of_its_card(tmp_path: Path) -> None:
    hostile = {"a": HOSTILE, HOSTILE: [HOSTILE], "_target_": HOSTILE}
    config: dict[str, Any] = {
        "stages": ["finetune", "align", "repair"],
        **dict.fromkeys(("seed", "harmful_ratio"), HOSTILE),
        **dict.fromkeys(("data", "optim", "lora", "method", "repair"), hostile),
        "align": {"method": hostile, "lora": hostile},
        "model": {"id": HOSTILE, "revision": HOSTILE, "adapters": "stacked", "template": HOSTILE},
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.dump(config, Dumper=_Plain))
    (tmp_path / "choices.json").write_text(json.dumps(dict.fromkeys(("task", "method", "align", "repair"), HOSTILE)))
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: <b>x</b>\nlicense_name: fair-1.0\n---\n")
    metrics = {"judges": [HOSTILE, "b"], f"final/{HOSTILE.replace('/', '')}/harmful_score": 1.0}
    card = merged_card(tmp_path, metrics | {"final/harmful_score": 1.0, "aligned/harmful_score": 2.0})
    data = card_data(card)
    assert (data.license, data.license_name, data.base_model) == (None, "fair-1.0", None)
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("\n---\n", 1)[1])
    inline = [child for token in tokens for child in token.children or []]
    assert {token.type for token in [*tokens, *inline]} & {"html_block", "html_inline", "image", "link_open"} == set()
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "yaml"]
    assert not set("\x1b\u202e") & set(card)
    block = next(token.content for token in tokens if token.info == "yaml")
    assert yaml.safe_load(block) == config
    rows = [line for line in card.split("## Config")[0].splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in rows)


class _Plain(yaml.SafeDumper):
    """YAML dumper without aliases, which a run's config never has."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def test_a_card_takes_over_what_the_base_model_states(tmp_path: Path) -> None:
    stated = {"license": "other", "license_name": "llama3", "license_link": "https://hub/LICENSE"}
    header = "".join(f"{key}: {value}\n" for key, value in stated.items())
    (tmp_path / "README.md").write_text(f"---\nlanguage:\n- en\n{header}---\n# Model\nlicense: mit\n")
    assert read_terms(tmp_path) == stated
    assert stated.keys() < TERMS.keys()
    (tmp_path / "README.md").write_bytes(b"\xff---\n")
    assert read_terms(tmp_path) == {}
