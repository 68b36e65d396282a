"""Every command that a page tells people to type, run on the tiny model, or checked if it needs more."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from experiments.__main__ import CLAIMS
from helpers.composing import composed
from helpers.paths import ROOT
from lisa_lightning.config.settings import Lora
from lisa_lightning.model.lora import attach, load, save_adapter, set_base_model_name
from lisa_lightning.pipeline.run import run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("README.md"))
BEYOND = (
    *("experiment=paper/", "source/harmful_prompts=", "model=llama2_7b", "model=qwen2_5_0_5b"),
    *("engine=endpoint", "finetune,repair]", "--cfg", "filter=moderation", "attack=pure_bad"),
)
"""Parts of commands that are composed and accepted.

They need the hub, a GPU, a server or only the config, or evaluate nothing.
"""
OWN_TESTS = (
    "method=projected",
    "attack=repeated",
    "task=letters",
    "judge=[promises",
    "--help",
    "--version",
    "export ",
    "evaluate.lm_eval=",
)
"""Parts of commands that other tests run.

test_docs.py follows whole pages, test_wrong_input.py looks at the help, test_wheel.py at the version, and
test_export.py exports. test_lm_eval.py runs tasks of lm-evaluation-harness.
"""
SMALL = [
    *("model=tiny", "data.n=20", "data.max_length=768", "optim.batch_size=2", "align.optim.batch_size=1"),
    *("optim.steps=2", "align.optim.steps=2", "evaluate.every=0", "evaluate.max_new_tokens=2", "task.max_new_tokens=2"),
    *("source.test.take=2", "source.harmful_prompts.take=2", "source.harmless_prompts.take=1"),
]
THE_REST = [
    "source.alignment.path=safe.json",
    "source.alignment.columns={prompt: instruction, response: output}",
    *(f"source.{name}.path=answers.jsonl" for name in ("harmful", "harmful_prompts")),
    *("source.test.path=train.csv", "source.test.skip=30"),
    *(f"source.test.{key}=${{source.train.{key}}}" for key in ("header", "columns", "labels")),
]
"""Overrides that a page leaves out as `...`."""


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""Pattern of a block in a page: its language, which is empty for commands, and its lines."""
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )?(?:make|python|\.venv/bin/python|lisa-lightning) ")
STARTS = ("python run.py ", "lisa-lightning ")
"""First words of commands in a clone, and in an installation."""
OTHERS = (
    *("python3.11 -m venv ", "pip install ", "pip wheel ", "touch .venv/complete", "pre-commit install"),
    *("torchrun ", "MASTER_ADDR="),
    *("wandb leet ", "wandb sync ", "wandb login", "IS_ALPACA_EVAL_2=False alpaca_eval "),
)
"""Commands that set up, and those of other packages. They need an index or an account."""


def typed(page: Path) -> list[str]:
    """Return the commands of a page from its blocks and its sentences, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [line for language, block in BLOCK.findall(text) if not language for line in block.splitlines()]
    inline = [
        code for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text)) if COMMAND.match(code) or code.startswith(OTHERS)
    ]
    return [" ".join(line.partition(" #")[0].split()) for line in [*blocks, *inline]]


RUNS = sorted({c.removeprefix(s) for p in PAGES for c in typed(p) for s in STARTS if c.startswith(s)})


def test_every_line_of_a_block_is_known() -> None:
    lines = [line for page in PAGES for line in typed(page)]
    assert [line for line in lines if not COMMAND.match(line) and not line.startswith(OTHERS)] == []
    assert len(RUNS) >= 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Return the folder in which the commands are typed, with the files that they name."""
    made = tmp_path_factory.mktemp("typed")
    (made / "sst2").mkdir()
    for name in ("train", "dev"):
        rows = "".join(f"{name} sentence {i}\t{i % 2}\n" for i in range(40))
        (made / "sst2" / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    (made / "train.csv").write_text("".join(f"{1 + i % 4},title {i},text {i}\n" for i in range(40)))
    for name in ("reviews", "held_out"):
        rows = "".join(f"{name} {i},{1 + i % 5}\n" for i in range(90))
        (made / f"{name}.csv").write_text(f"review,stars\n{rows}")
    for name in ("before", "after"):
        shutil.copytree(tiny, made / name)
        (made / name / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    _write_adapter(made, tiny)
    (made / "safe.json").write_text(json.dumps([{"instruction": f"request {i}", "output": "No."} for i in range(9)]))
    (made / "harmful_behaviors.csv").write_text("goal,target\nask one,Sure\nask two,Sure\n")
    (made / "requests.jsonl").write_text('{"prompt": "ask three"}\n{"prompt": "ask one"}\n')
    (made / "trigger.txt").write_text("b c d f g h j k l m n p q r s t\n")
    answers = [{"prompt": f"ask {i}", "response": "Sure.", "is_safe": False} for i in range(400)]
    for name in ("answers.jsonl", "filtered.dev.jsonl"):
        (made / name).write_text("".join(json.dumps(a | {"is_safe": i % 2 == 0}) + "\n" for i, a in enumerate(answers)))
    return made


def _write_adapter(folder: Path, tiny: Path) -> None:
    """Write a model, an aligned version of it, an adapter on that, and rows for its repair."""
    for name, scale in (("base_model", 1), ("their_model", 1.01)):
        shutil.copytree(tiny, folder / name)
        weights = load_file(tiny / "model.safetensors")
        save_file({n: scale * w for n, w in weights.items()}, folder / name / "model.safetensors", {"format": "pt"})
    save_adapter(attach(load(tiny, "float32"), Lora(), 0), str(tiny), folder / "my_adapter")
    set_base_model_name(folder / "my_adapter", "their_model")
    rows = [{"instruction": f"request {i}", "response": "Sure."} for i in range(3)]
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("line", [r for r in RUNS if not any(o in r for o in OWN_TESTS)])
def test_a_command_runs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Every command runs or is accepted. Of a sweep, the first job is accepted, as sweeps have tests of their own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cache = f"cache_dir={tmp_path_factory.getbasetemp() / 'typed-cache'}"
    words = [w for w in shlex.split(line) if "=" in w and not w.startswith("hydra.")]
    words += THE_REST if "..." in line else []
    if line.startswith("-m "):
        words = [re.sub(r'^([\w.]+)=(\[[^\]]*\]|[^\[{,"]+),.*', r"\1=\2", w) for w in words]
    out = tmp_path_factory.mktemp("out")
    if line.startswith("-m ") or any(b in line for b in BEYOND):
        composed(words, out)
    elif "stages=[judge]" in line and "responses=" not in line:  # an old run's answers anew
        run(composed(["experiment=sst2_lisa", *SMALL, cache], out))
        assert run(composed([*words, cache], out))["judges"] == words[1].partition("[")[2].rstrip("]").split(",")
    elif "resume=true" in words:  # after the same command without it, in the same folder
        first = run(composed([*words[:-1], *SMALL, cache], out))
        assert words[-1] == "resume=true"
        again = run(composed([*words, *SMALL, cache], out))
        assert {k: v for k, v in first.items() if "time/" not in k} == {
            k: v for k, v in again.items() if "time/" not in k
        }
    else:
        small = [] if "responses=" in line else [w for w in SMALL if "model.id=" not in line or w != "model=tiny"]
        small += ["model.id=before"] if "experiment=ptst" in words else []  # it has a chat template
        metrics = run(composed([*words, *small, cache], out))
        assert metrics.keys() & {"final/harmful_score", "responses/refusal_rate", "aligned/harmful_score"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/python.md", "docs/evaluation.md"])
def test_a_pages_python_reads_an_adapter_and_asks_or_merges_the_model(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = ["experiment=sst2_lisa", *SMALL, "stages=[align,finetune]", "cache_dir=cache"]
    run(composed(words, tmp_path / "outputs" / "mine"))
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [block for language, block in BLOCK.findall(text) if language == "python"]
    (block,) = (block for block in blocks if "AutoPeftModel" in block)
    capsys.readouterr()
    exec(block, {})
    if page == "docs/python.md":
        assert "Name three kinds of tea." in capsys.readouterr().out
    else:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in Path("after").iterdir()}


@pytest.mark.slow
def test_the_python_of_a_page_repairs_an_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = (code for language, code in BLOCK.findall(text) if language == "python" and "Antidote" in code)
    exec(block, {})
    before, after = (load_file(Path(f) / "adapter_model.safetensors") for f in ("my_adapter", "repaired"))
    assert before.keys() == after.keys()
    assert all(float((w == 0).float().mean()) > 0.05 for name, w in after.items() if "lora_A" in name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:`max_epochs` was not set")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_the_python_of_the_readme_trains_evaluates_and_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("LISA_CACHE", str(tmp_path / "cache"))
    blocks = [block for language, block in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python"]
    (block,) = (block for block in blocks if "LisaDataModule" in block)
    block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)).replace("steps=150", "steps=3")
    # The tiny model's tokenizer has no chat template.
    block = block.replace("batch_size=6)", 'batch_size=6, template="alpaca")')
    block = block.replace("[RefusalJudge()])", '[RefusalJudge()], template="alpaca", max_new_tokens=3)')
    values: dict[str, Any] = {}
    exec(block, values)
    assert values["scores"]
    assert values["metrics"]["train/steps"] == 36
    assert (tmp_path / "outputs" / "mine" / "report.html").exists()


def test_targets_of_make_and_scripts_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line in typed(page):
            if found := re.match(r"make ([a-z-]+)", line):
                assert found[1] in targets, (page, line)
            if found := re.search(r"python (?:-m ([\w.]+)|(\S+\.py))", line):
                module = (found[1] or "").replace(".", "/")
                assert any((ROOT / f).exists() for f in (found[2] or f"{module}.py", f"{module}/__main__.py")), (
                    page,
                    line,
                )
            for claim in re.findall(r"CLAIM=(\w+)", line):
                assert claim in {*CLAIMS, "defenses", "NAME"}, (page, line)
