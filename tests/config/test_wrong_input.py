"""Wrong input: a sentence that names the key, the value and what is allowed; exit status 2; nothing half-written."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from helpers.forking import Forked, run
from helpers.paths import ROOT
from lisa_lightning.config.rules import RULES
from lisa_lightning.config.validate import check
from lisa_lightning.runtime.errors import UserError, first_line

FOLDER = ROOT / "conf" / "experiment"
EXPERIMENTS = sorted(str(f.relative_to(FOLDER).with_suffix("")) for f in FOLDER.rglob("*.yaml"))
JUDGES = sorted(f.stem for f in (ROOT / "conf" / "judge").glob("[!_]*.yaml"))
Config = Callable[..., DictConfig]

# our own harmless prompts stand beside the hub's sets, as a file
HARMLESS = {f"source.harmless_prompts.{k}" for k in ("hub", "config", "split", "revision", "files", "rows")}

REFUSED = {
    "+model.tiny={hidden_size: 32, layers: 1, heads: 32}": "heads=32: the first must be a multiple of twice the second",
    "harmful_ratio=1.5": "harmful_ratio=1.5 is not allowed; it must be a number from 0 to 1",
    "harmful_ratio=-0.1": "a number from 0 to 1",
    "harmful_ratio=much": "harmful_ratio=much is not allowed",
    "harmful_ratio=.nan": "a number from 0 to 1",
    "cache_dir=null": "cache_dir=None is not allowed; it must be the path of a folder",
    "model.id=5": "model.id=5 is not allowed; it must be a hub id or a folder, or null",
    "wandb.tags=x": "wandb.tags=x is not allowed; it must be a list",
    "wandb.tags=['']": "it must be a list of texts of 1 to 64 characters",
    "wandb.project=null": "it must be a name",
    "wandb.project=team/lisa": "none of them / ",
    "trainer.num_nodes=-1": "a whole number above 0",
    "trainer.devices=null": "it must be a whole number above 0, a list of devices, -1 or auto for all",
    "trainer.devices=0": "trainer.devices=0 is not allowed",
    "method.rho=-1": "method.rho=-1 is not allowed; it must be a number of at least 0",
    "method.alignment_steps=-5": "a whole number of at least 0",
    "method.user_steps=2.5": "a whole number of at least 0",
    "method.proximal_after=2": "method.proximal_after=2",
    "optim.batch_size=0": "optim.batch_size=0 is not allowed; it must be a whole number above 0",
    "optim.accumulate=0": "optim.accumulate=0",
    "optim.lr=0": "optim.lr=0 is not allowed; it must be a number above 0",
    "optim.clip=-1": "a number above 0, or null",
    "optim.schedule=step": "it must be constant or linear or cosine",
    "align.optim.steps=0": "align.optim.steps=0",
    "data.n=0": "data.n=0",
    "optim.epochs=3": "optim.steps=150 and optim.epochs=3: one of them must be null",
    "optim.steps=null": "one of them must be null",
    "data.allow_overlap=some": "it must be true or false",
    "responses=answers.jsonl": "responses=answers.jsonl is judged by stages=[judge] alone",
    "model.template=llama": "it must be alpaca or alpaca_newline or chat",
    "model.adapters=two": "it must be stacked or continued",
    "model.quantize=int8": "it must be nf4, or null",
    "task.max_new_tokens=0": "task.max_new_tokens=0",
    "data.order=random": "it must be seeded or head",
    "lora.dropout=1": "lora.dropout=1",
    "lora=5": "it must be a mapping, or null for full-parameter fine-tuning. Fix: lora.KEY=VALUE, or lora=null",
    "seed=-1": "seed=-1",
    "seed=true": "seed=True",
    "resume=yes_please": "it must be true or false",
    "stages=[align,align]": "each once",
    "stages=[]": "it must be a list of curate, align, finetune, repair, evaluate, judge",
    "stages=[train]": "['train'] is not allowed",
    "stages=align": "stages=align is not allowed",
    "stages=[align,judge]": "judge needs evaluate's answers",
    "+trainer.gradient_clip_val=0.5": "use optim.clip",
    "+trainer.max_steps=10": "use optim.steps",
    "+trainer.max_epochs=3": "use optim.epochs",
    "+trainer.barebones=true": "of the supported Trainer arguments: accelerator, devices",
    "+trainer.gradient_clip_val=1": "optim.clip",
    "trainer.max_time=8h": "trainer.max_time=8h is not allowed; it must be a duration DD:HH:MM:SS",
    "trainer.deterministic=maybe": "true, false, warn or null",
    "trainer.precision=16-true": "it must be 32-true or bf16-mixed or 16-mixed",
    "trainer.precision=bf16-true": "it must be 32-true or bf16-mixed",
    "trainer.strategy=ddp_spawn": "it must be auto or ddp",
    "optim.betas=0.9": "a list of two numbers",
    "lora.targets=[]": "all-linear or a list of module names",
    "model.dtype=float33": "it must be float32 or bfloat16 or float16",
    "source.train=rows.jsonl": "source.train=rows.jsonl is not allowed; it must be a mapping",
    "source.train.columns=text": "a mapping such as {field: column}",
    "source.train.path=null": "it must be the path of a file",
    "source.train.skip=-1": "source.train.skip=-1",
    "+align.method.active_layers=0": "align.method.active_layers is not a key of SFT",
    "optim.steps=99999999999999999999": "it must be a whole number above 0, up to 2147483647, or null",
    "lora.r=100000000": "it must be a whole number above 0, up to 16384",
    "optim.batch_size=100000000": "it must be a whole number above 0, up to 65536",
    "method.rho=1e308": "it must be a number of at least 0",
    "trainer.timeout_min=0": "it must be a number above 0, up to 525600",
}

REFUSED_OF_CHOICES = {
    "task=gsm8k task.question_suffix=1": "task.question_suffix=1",
    "repair=nlsr repair.sparsity_ratio=1": "it must be a number between 0 and 1",
    "repair=safe_lora repair.threshold=2": "repair.threshold=2 is not allowed; it must be a number from -1 to 1",
    "curate=seal curate.activation=relu": "curate.activation=relu is not allowed; it must be softmax or sigmoid",
    "model=tiny model.tiny.layers=1000000": "it must be a whole number above 0, up to 16384",
}
NEEDED = {  # what has no value as shipped
    **{
        name: (f"judge.{name}.model=m", *(f"judge.{name}.usd_per_million_{side}=1" for side in ("input", "output")))
        for name in ("openai", "strongreject", "win_rate")
    },
    "linear": ("judge.linear.rows.path=rows.jsonl",),
    "strongreject_finetuned": ("judge.strongreject_finetuned.id=folder",),
}
REFUSED_OF_JUDGES = {
    "judge.moderation.batch_size=0": "judge.moderation.batch_size=0 is not allowed; it must be a whole number above 0",
    "judge.moderation.max_length=many": "judge.moderation.max_length=many",
    "judge.moderation.threshold=1": "it must be a number between 0 and 1",
    "judge.moderation.dtype=int8": "it must be float32 or bfloat16 or float16",
    "judge.moderation.harmful_labels=toxic": "a list of labels, or null",
    "judge.moderation.id=null": "a hub id or a folder",
    "judge.moderation.text=null": "judge.moderation.text=None is not allowed",
    "judge.openai.rubric=null": "judge.openai.rubric=None is not allowed",
    "judge.llama_guard.before=null": "judge.llama_guard.before=None is not allowed; it must be a text",
    "judge.moderation.revision=1": "judge.moderation.revision=1",
    "judge.llama_guard.max_length=0": "judge.llama_guard.max_length=0",
    "judge.llama_guard.dtype=float": "judge.llama_guard.dtype=float is not allowed",
    "judge.llama_guard.template=''": "it must be a text, or null",
    "judge.harmbench.template=null": "judge.harmbench.template=None is not allowed; it must be a text",
    "judge.harmbench.max_response_length=0": "it must be a whole number above 0",
    "judge.strongreject.flag_from=0": "judge.strongreject.flag_from=0 is not allowed",
    "judge.strongreject.system=null": "judge.strongreject.system=None is not allowed; it must be a text",
    "judge.strongreject_finetuned.flag_from=2": "judge.strongreject_finetuned.flag_from=2 is not allowed",
    "judge.wildguard.max_new_tokens=0": "it must be a whole number above 0, up to 65536",
    "judge.openai.flag_from=1": "judge.openai.flag_from=1 is not allowed; it must be 2, 3, 4 or 5",
    "judge.openai.concurrency=0": "judge.openai.concurrency=0 is not allowed; it must be a whole number above 0",
    "judge.openai.retries=-1": "a whole number of at least 0",
    "judge.openai.timeout_s=0": "a number above 0",
    "judge.openai.max_cost_usd=null": "judge.openai.max_cost_usd=None is not allowed; it must be a number above 0",
    "judge.openai.max_output_tokens=0.5": "a whole number above 0",
    "judge.openai.usd_per_million_input=-1": "a number of at least 0",
    "judge.openai.base_url=https://me:sec/r@t@host/v1": "base_url=https://...@host/v1 is not allowed",
    "judge.openai.base_url=me:secret@host/v1": "base_url=...@host/v1 is not allowed",
    "judge.openai.base_url=localhost:8000/v1": "it must be http(s)://...",
    "judge.openai.base_url='https://host/v1?api-key=secret'": "base_url=https://host/v1?... is not allowed",
    "judge.openai.temperature=3": "a number from 0 to 2, or null",
    "judge.win_rate.usd_per_million_output=free": "judge.win_rate.usd_per_million_output=free",
    "judge.win_rate.concurrency=2.5": "judge.win_rate.concurrency=2.5",
    "judge.linear.rows=rows.jsonl": "judge.linear.rows=rows.jsonl is not allowed; it must be a mapping",
    "judge.linear.rows.skip=-1": "judge.linear.rows.skip=-1",
    "judge.linear.rows.take=0": "a whole number above 0, up to 2147483647, or null",
}


@pytest.mark.slow
@pytest.mark.parametrize("override", REFUSED)
def test_wrong_values_are_refused(config: Config, override: str) -> None:
    with pytest.raises(UserError) as error:
        check(config("experiment=sst2_lisa", override))
    assert REFUSED[override] in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", REFUSED_OF_CHOICES)
def test_wrong_values_of_choices_are_refused(config: Config, overrides: str) -> None:
    with pytest.raises(UserError) as error:
        check(config("experiment=sst2_lisa", *overrides.split()))
    assert REFUSED_OF_CHOICES[overrides] in str(error.value)


def test_an_exception_is_quoted_by_the_first_line_that_says_something_else_by_its_name() -> None:
    assert [first_line(ValueError(text)) for text in ("a\nb", "\n a\nb", "", " \n")] == ["a", " a", *["ValueError"] * 2]


@pytest.mark.slow
@pytest.mark.parametrize("override", REFUSED_OF_JUDGES)
def test_wrong_values_of_judges_are_refused(config: Config, override: str) -> None:
    name = override.split(".")[1]
    whole = "rows=" in override  # which leaves no rows.path to set
    with pytest.raises(UserError) as error:
        check(config(f"judge={name}", *(() if whole else NEEDED.get(name, ())), override))
    assert REFUSED_OF_JUDGES[override] in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGES)
def test_judges_are_accepted_as_shipped(config: Config, name: str) -> None:
    check(config(f"judge={name}", *NEEDED.get(name, ())))


def test_points_that_are_never_measured_are_refused(config: Config) -> None:
    with pytest.raises(UserError, match=r"gradient_rows=24 needs evaluate\.every above 0"):
        check(config("experiment=sst2_lisa", "evaluate.every=0", "evaluate.gradient_rows=24"))


def test_two_states_of_length_zero_are_refused(config: Config) -> None:
    with pytest.raises(UserError, match="one of them must be above 0"):
        check(config("method.alignment_steps=0", "method.user_steps=0"))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_accepted(config: Config, experiment: str) -> None:
    cfg = config(f"experiment={experiment}")
    if OmegaConf.is_missing(cfg.source, "refusals"):  # a file that the user has to have
        with pytest.raises(UserError, match=r"^source\.refusals has no value\. Fix: set source\.refusals=\.\.\.$"):
            check(cfg)
        cfg = config(f"experiment={experiment}", "source.refusals=pairs.json")
    check(cfg)


def test_local_files_are_asked_for_by_key(config: Config) -> None:
    with pytest.raises(UserError, match=r"source\.[a-z_]+\.path has no value\. Fix: set source\.[a-z_]+\.path="):
        check(config("source=local"))


@pytest.mark.slow
def test_every_rule_is_about_a_key_that_exists(config: Config) -> None:
    absent = {rule.replace("align.method.", "method.") for rule in set(RULES) - HARMLESS}  # a method is asked for once
    judges = (f"judge=[{','.join(JUDGES)}]", *(override for needed in NEEDED.values() for override in needed))
    groups = ("method", "align", "repair", "curate")
    chosen = [f"{g}={f.stem}" for g in groups for f in (ROOT / "conf" / g).glob("[!_]*.yaml")]
    for overrides in ((), ("source=hub",), ("model=tiny",), *((choice,) for choice in chosen), judges):
        cfg = config("experiment=sst2_lisa", *overrides)
        check(cfg)
        own = {k: cfg.align if k.startswith("method.") else cfg for k in absent}
        absent = {
            k
            for k in absent
            if all(OmegaConf.select(c, k, default="absent") == "absent" for c in (cfg, own[k]) if c is not None)
        }
    assert not absent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["experiment=sst2_lissa"], "experiment=sst2_lissa is not known; did you mean sst2_lisa"),
        (["method=lise"], "method=lise is not known; did you mean lisa"),
        (["judge=[embedded,refuse]"], "judge=refuse is not known; did you mean refusal"),
        (["method=sft,lisa"], "for a sweep add -m"),
        (["method.roh=1"], "method.roh is not a key of what was chosen as method; did you mean method.rho"),
        (["trainer.accumulate_grad_batches=4"], "trainer.accumulate_grad_batches: Lightning can't honour this under"),
        (["method=sft", "method.rho=1"], "method.rho is not a key of what was chosen as method; it has none"),
        (["optim.lr"], "optim.lr"),
        (["harmful_ratio=2"], "harmful_ratio=2 is not allowed"),
        (["experiment=smoke", "data.n=100000"], "harmful_ratio=0.1 needs 10000 harmful rows"),
        (["experiment=smoke", "source.train.path=none.jsonl"], "none.jsonl: can't be read (No such file"),
        (["experiment=smoke", "hydra.run.dir=/dev/null/out"], "/dev/null/out can't be used: Not a directory"),
        (["experiment=smoke", "model=smollm2_135m", "model.id=no/such"], "model.id=no/such: the hub can't be read ("),
        (["experiment=smoke", "lora.targets=[nope]"], "lora.targets"),
        (["experiment=smoke", "align=none", "method=asft"], "method=asft: needs the alignment update. Fix: "),
        (["experiment=smoke", "align=booster", "source.defender.path=null"], "Fix: set source.defender.path"),
        (["experiment=smoke", "trainer.accelerator=gpu"], "trainer"),
        (["experiment=smoke", "align=none", "curate=seal"], "curate=seal: selects rows for stage align, which"),
        (["experiment=smoke", "stages=[align,repair]", "repair=nlsr"], "repair=nlsr: repairs the adapter of stage"),
        (["experiment=smoke", "repair=nlsr", "model.adapters=continued"], "Fix: set model.adapters=stacked"),
        (["repair=nlsr", "source.defender.path=embedded:harmful.jsonl", "data.allow_overlap=true"], "prefers refusals"),
        (["experiment=smoke", "model.quantize=nf4"], "model.quantize=nf4: it needs an NVIDIA GPU"),
        (["experiment=smoke", "model.template=chat"], "this tokenizer has no chat template"),
        (["experiment=smoke", "judge=linear"], "judge.linear.rows.path has no value"),
        (
            ["experiment=smoke", "judge=moderation", "judge.moderation.id=no/such"],
            "judge.moderation.id=no/such: the hub can't be read (",
        ),
        (["stages=[judge]"], "holds no answers to judge"),
        (
            ["experiment=smoke", "method._target_=nowhere.M"],
            "method._target_=nowhere.M: No module named 'nowhere'",
        ),
        (["experiment=smoke", "model.id=."], "model.id=.: no *.safetensors in it"),
    ],
)
def test_the_command_says_a_sentence_and_exits_with_2(
    forked: Forked, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = run(forked, tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr
    assert not list(tmp_path.rglob("metrics.json")) + list(tmp_path.rglob("*.part*"))
    left = [log.parent for log in tmp_path.rglob("run.log") if not log.read_text()]
    assert all((folder / "config.yaml").exists() for folder in left)  # refused after it had begun


@pytest.mark.slow
def test_verdicts_on_a_file_go_into_no_runs_folder(forked: Forked, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.json", "judged.jsonl"):
        (tmp_path / "run" / name).write_text("{}\n")
    (tmp_path / "answers.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    asked = ("stages=[judge]", "judge=refusal", "responses=answers.jsonl", "hydra.run.dir=")
    done = run(forked, tmp_path, *asked[:3], asked[3] + "run")
    assert (done.returncode, "run holds a run, whose verdicts would be lost" in done.stderr) == (2, True)
    assert (tmp_path / "run" / "metrics.json").read_text() == "{}\n"
    for _ in range(2):  # another judge may follow
        assert run(forked, tmp_path, *asked[:3], asked[3] + "other").returncode == 0


@pytest.mark.slow
def test_help_names_what_can_be_chosen_and_says_what_keys_mean(forked: Forked, tmp_path: Path) -> None:
    shown = run(forked, tmp_path, "--help").stdout
    (judges,) = re.findall(r"^  judge=embedded: who says .+\n((?: {3,}.+\n)+)", shown, re.MULTILINE)
    about = re.findall(r"^  (\w+)=\w+: ", shown, re.MULTILINE)
    assert sorted([*about, "paper"]) == sorted(f.name for f in (ROOT / "conf").iterdir() if f.is_dir())
    assert " ".join(judges.split()).split(", ") == sorted(f.stem for f in (ROOT / "conf" / "judge").glob("[!_]*.yaml"))
    assert "harmful_ratio: 0.1          # Share p of harmful rows" in shown
    assert "${model.finetune_targets}" in shown
    assert re.search(r"^  rho: 0\.1 +# Proximal factor\. .* Allowed: a number of at least 0", shown, re.MULTILINE)


@pytest.mark.slow
def test_a_password_on_the_command_line_is_written_nowhere(forked: Forked, tmp_path: Path) -> None:
    address = "judge.openai.base_url=https://me:hidden@host/v1"
    done = forked.run(["-m", "experiment=smoke", "judge=openai", address, "seed=1,2"], tmp_path, {})
    assert done.returncode == 2
    assert "judge.openai.base_url=https://...@host/v1 is not allowed" in done.stderr
    assert not (tmp_path / "multirun").exists()


@pytest.mark.slow
def test_help_that_nobody_reads_to_its_end_says_nothing_of_it() -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
        assert asked.stdout is not None
        assert asked.stderr is not None
        asked.stdout.close()
        assert asked.stderr.read() == b""
    assert asked.returncode == 128 + signal.SIGPIPE
