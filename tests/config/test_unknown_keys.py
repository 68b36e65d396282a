"""A key that nothing reads is refused with the closest that is read, wherever it is added."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from helpers.paths import CONF
from lisa_lightning.config.validate import check, flat, plain
from lisa_lightning.runtime.errors import UserError

Config = Callable[..., DictConfig]
CHOICES = [
    f"{group}={file.stem}"
    for group in ("method", "align", "curate", "repair", "judge", "model", "trainer", "task")
    for file in sorted((CONF / group).glob("[!_]*.yaml"))
    if file.stem not in ("openai", "strongreject", "strongreject_finetuned", "win_rate", "linear")
]
OWN_COLUMNS = re.compile(r".*\.(columns|labels|where)\..*")


def accept(cfg: DictConfig) -> None:
    check(cfg)


def refused(cfg: DictConfig) -> str:
    with pytest.raises(UserError) as error:
        accept(cfg)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_accepted_and_every_misspelt_key_of_it_is_not(config: Config, choice: str) -> None:
    """Every choice is accepted. A misspelt key, one letter longer and next to the right one, is refused with a hint."""
    cfg = config("experiment=smoke", choice)
    accept(cfg)
    group = choice.partition("=")[0]
    keys = [key for key, _ in flat(plain(cfg)) if not OWN_COLUMNS.fullmatch(key)]
    for key in [key for key in keys if key.startswith(f"{group}.")][::4]:
        other = cfg.copy()
        OmegaConf.update(other, f"{key}x", 1, force_add=True)
        message = refused(other)
        assert f"{key}x" in message
        suggestions = ("did you mean", "allowed: ", "none of the supported", "takes none")
        assert any(suggestion in message for suggestion in suggestions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+foo=1", "foo is not a key of the config; "),
        ("+foo.bar.baz=1", "foo.bar.baz is not a key of the config; "),
        ("+foo={}", "foo is not a key of the config; "),
        ("+optim.warmup=0", "did you mean optim.warmup_ratio"),
        ("+optim.weight_deacy=0.1", "did you mean optim.weight_decay"),
        ("+learning_rate=1", "learning_rate is not a key of the config; "),
        ("+lr=1", "did you mean optim.lr"),
        ("++lr=1", "did you mean optim.lr"),
        ("+plugins=csv", "plugins is not a key of the config; "),
        ("+source.train.foo=1", "source.train.foo is not a key of the config; "),
        ("+source.train.colums={sentence: text}", "source.train.columns"),
        ("+source.foo.path=x", "source.foo.path is not a key of the config"),
        ("+task.hub.foo=1", "task.hub.foo is not a key of the config"),
        ("+task.question_suffix=x", "task.question_suffix is not a key of SST2"),
        ("+align.foo=1", "align.foo is not a key of the config"),
        ("+source.train.rows=5", "source.train.rows is not a key of the config"),
        ("+source.foo.columns.a=b", "source.foo.columns.a is not a key of the config"),
        ("+source.refusals=3", "source.refusals is not a key of the config"),
        ("+repair.reference.extrapolation=1", "repair.reference.extrapolation: repair=none has no keys"),
        ("+align.method.foo=1", "align.method.foo is not a key of SFT; it takes none"),
        ("+method.pho=1", "method.pho is not a key of Lisa; did you mean rho"),
        ("+repair.threshold=1", "repair.threshold: repair=none has no keys"),
        ("+curate.keep=0.5", "curate.keep: curate=none has no keys"),
        ("+judge.embedded.model=1", "judge.embedded.model is not a key of EmbeddedJudge; it takes none"),
        ("+judge.foo.model=1", "judge.foo.model is not a key of the config"),
        ("+trainer.max_steps=1", "use optim.steps"),
        ("+trainer.foo=null", "none of the supported"),
        ("+hparams={optim: {lr: 1}}", "hparams.optim.lr is not a key of the config"),
    ],
)
def test_an_added_key_is_refused(config: Config, override: str, expected: str) -> None:
    assert expected in refused(config("experiment=smoke", override))


@pytest.mark.parametrize("key", ["extrapolation", "dpo.optim.lr"])
@pytest.mark.parametrize("repair", ["safe_lora", "safe_merge"])
def test_a_reference_by_dpo_belongs_to_nlsr(config: Config, repair: str, key: str) -> None:
    cfg = config("experiment=smoke", f"repair={repair}", f"+repair.reference.{key}=1")
    assert f"repair.reference.{key}: the chosen repair does not read it" in refused(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("judges", [None, "text", 5, [1], {"x": 5}])
def test_judges_of_ones_own_experiment_are_a_mapping(config: Config, judges: object) -> None:
    cfg = config("experiment=smoke")
    OmegaConf.set_struct(cfg, False)
    cfg.judge = judges
    assert refused(cfg).startswith("judge")


def test_a_key_of_another_method_is_no_key_of_this_one(config: Config) -> None:
    assert "method.rho is not a key of SFT" in refused(config("experiment=smoke", "method=sft", "+method.rho=1"))


@pytest.mark.slow
def test_every_key_of_the_shipped_config_is_needed_as_it_is_spelt(config: Config) -> None:
    cfg = config("experiment=smoke")
    for key in [key for key, _ in flat(plain(cfg)) if not OWN_COLUMNS.fullmatch(key)][::5]:
        other = cfg.copy()
        OmegaConf.update(other, f"{key}x", 1, force_add=True)
        assert f"{key}x" in refused(other)


def test_a_key_of_ones_own_experiment_file_is_checked_too(config: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# @package _global_\noptim: {warmup: 3}\n")
    cfg = OmegaConf.merge(OmegaConf.create(plain(config("experiment=smoke"))), OmegaConf.load(tmp_path / "mine.yaml"))
    assert isinstance(cfg, DictConfig)
    assert "did you mean optim.warmup_ratio" in refused(cfg)


@pytest.mark.parametrize("endpoint", ["openai", "strongreject", "win_rate"])
def test_judges_behind_an_endpoint_know_their_keys(config: Config, endpoint: str) -> None:
    needed = [f"judge.{endpoint}.{k}" for k in ("model=m", "usd_per_million_input=1", "usd_per_million_output=1")]
    cfg = config("experiment=smoke", f"judge={endpoint}", *needed)
    accept(cfg)
    OmegaConf.update(cfg, f"judge.{endpoint}.api_key", "x", force_add=True)
    assert f"judge.{endpoint}.api_key is not a key of " in refused(cfg)


DELETED = ("data", "optim", "optim.lr", "data.n", "lora", "align.lora.r", "source", "source.train", "source.train.path")
DELETED += (
    "seed",
    "stages",
    "wandb",
    "trainer.devices",
    "model.dtype",
    "task.max_new_tokens",
    "align",
    "repair",
    "curate",
)


@pytest.mark.slow
@pytest.mark.parametrize("key", DELETED)
def test_a_deleted_key_is_named(config: Config, key: str) -> None:
    assert re.match(rf"{re.escape(key)}(\.\w+)* was deleted", refused(config("experiment=smoke", f"~{key}")))


@pytest.mark.slow
@pytest.mark.parametrize("value", ["null", "5", "text"])
@pytest.mark.parametrize("section", ["data", "optim", "align.lora", "align.optim", "source.train", "wandb"])
def test_a_section_is_a_mapping(config: Config, section: str, value: str) -> None:
    message = refused(config("experiment=smoke", f"{section}={value}"))
    assert message.startswith(f"{section}=")
    assert "mapping" in message


@pytest.mark.parametrize("group", ["method", "judge"])
def test_a_stage_without_its_choice_is_refused(config: Config, group: str) -> None:
    assert f"{group}: the stage" in refused(config("experiment=smoke", f"~{group}"))


TARGETS = {
    "method._target_=os.getcwd": "is not a class",
    "judge.embedded._target_=os.getcwd": "is not a class",
    "task._target_=os.getcwd": "is not a class",
    "task._target_=pathlib.Path": "lacks fields, optional, row",
    "judge.embedded._target_=lisa_lightning.method.lisa.Lisa": "lacks metric, verdicts",
    "method._target_=nowhere.M": "No module named 'nowhere'",
    "method._target_=lisa_lightning.method.lisa.Lisb": "has no Lisb",
    "method._target_=lisa": "is not a class. Fix: write MODULE.CLASS",
    "method._target_=5": "is not a class. Fix: write MODULE.CLASS",
    "align.method._target_=nowhere.M": "No module named 'nowhere'",
}


@pytest.mark.slow
@pytest.mark.parametrize("override", TARGETS)
def test_a_target_that_is_none_is_refused(config: Config, override: str) -> None:
    assert TARGETS[override] in refused(config("experiment=smoke", override))


def test_a_missing_argument_is_named(config: Config) -> None:
    assert "method.rho is missing. Fix: " in refused(config("experiment=smoke", "~method.rho"))
