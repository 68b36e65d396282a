"""Cache keys and results of the stages of an attack or a filter, without a run: `outliers`, `filter` and `finetune`."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from lisa_lightning.attack.abliterate import Abliterate
from lisa_lightning.attack.base import RowSelector
from lisa_lightning.config.instances import build
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.settings import ModelSettings
from lisa_lightning.config.validate import plain
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.mixing import UserRows
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.pipeline.stages import outliers
from lisa_lightning.pipeline.stages.edit import edit
from lisa_lightning.pipeline.stages.filter import filter_rows
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.outliers import select_outliers
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.errors import UserError

RANK_ZERO: Any = SimpleNamespace(is_global_zero=True)
HARMFUL = [Row(f"bad {i}", "", "sure") for i in range(4)]
TASK = [Row(f"task {i}", "", "label") for i in range(6)]
USER = UserRows([], TASK[:2], [Row("safe", "", "no")])


def rows(train: Sequence[Row] = TASK, harmful: Sequence[Row] = HARMFUL, alignment: Sequence[Row] = TASK) -> Rows:
    """Return the sets of a source."""
    return Rows([*train], [*alignment], [*harmful], [], {}, {}, [], {})


class Cache:
    """Stands in for the cache of stages: collects keys, and either makes a result or has a finished one."""

    def __init__(self, folder: Path, files: dict[str, str] | None = None) -> None:
        """Take the folder, and the files of the finished result; without them it is made."""
        self.folder, self.files = folder, files
        self.keys: list[str] = []

    def run(self, _: str, key: Any, make: Callable[[Path], Metrics]) -> tuple[Path, Metrics]:
        """Return the folder of the result."""
        self.keys.append(short_hash(key))
        for name, text in (self.files or {}).items():
            (self.folder / name).write_text(text)
        return self.folder, {} if self.files else make(self.folder)


def key_of_outliers(folder: Path, cfg: DictConfig, sets: Rows, aligned: str = "a") -> str:
    """Return the key of the stage outliers, whose finished result is the rows 4 and 1."""
    config = plain(cfg)
    cache: Any = Cache(folder, {"rows.json": json.dumps({"rows": [4, 1]})})
    attack: RowSelector = build(config["attack"], "attack")
    arguments: Any = (cache, None, None, RANK_ZERO, Model(Path(aligned)), attack)
    stage: Any = select_outliers
    user, _ = stage(*arguments, sets, USER, parse_settings(config))
    assert user == UserRows([], [sets.train[1], sets.train[4]], USER.safe)
    return cache.keys[0]


def test_the_key_of_outliers_has_all_that_selects_them(config: Callable[..., DictConfig], tmp_path: Path) -> None:
    def key(*words: str, sets: Rows = rows(), aligned: str = "a") -> str:  # noqa: B008
        return key_of_outliers(tmp_path, config("experiment=smoke", "attack=benign_outlier", *words), sets, aligned)

    for by in ("representation", "gradient"):
        chosen = f"attack.by={by}"
        before = key(chosen)
        assert before == key(chosen, "optim.lr=0.5")
        changed = {
            key(chosen, "attack.reference_rows=2"),
            key(chosen, "evaluate.batch_size=3"),
            key(chosen, sets=rows(train=[*TASK, TASK[0]])),
            key(chosen, sets=rows(harmful=HARMFUL[1:])),
            key(chosen, aligned="b"),
        }
        assert len(changed) == 5
        assert before not in changed
        # Gradients are those of the adapter, which fine-tuning starts from.
        of_adapter = {before, key(chosen, "lora.r=2"), key(chosen, "seed=9"), key(chosen, "lora=null")}
        assert len(of_adapter) == (4 if by == "gradient" else 1)
    assert key("attack.by=gradient") != key()
    with pytest.raises(UserError, match=r"data\.n=2: the attack selects from 1 rows\. Fix: a smaller attack\.count"):
        key(sets=rows(train=TASK[:1]))


@pytest.mark.parametrize("by", ["representation", "gradient"])
def test_a_planted_harmful_row_is_selected(
    config: Callable[..., DictConfig], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Its request alone is not what counts: the same request with another answer is not selected."""
    compared = []
    for name in ("mean_cosines", "gradient_cosines"):
        function = getattr(outliers, name)
        monkeypatch.setattr(outliers, name, lambda *a, f=function, name=name: compared.append(name) or f(*a))
    words = ("attack=benign_outlier", f"attack.by={by}", "attack.reference_rows=1", "align=none")
    for lora in ("lora.r=2", "lora=null"):
        cfg = plain(config("experiment=smoke", *words, lora))
        candidates = [Row("bad 0", "", "I won't do that."), *TASK, HARMFUL[0]]
        models = ModelSource(Model(tiny), ModelSettings(dtype="float32"))
        encoder = Encoder(load_tokenizer(tiny), "alpaca", 400)
        fabric: Any = SimpleNamespace(is_global_zero=True, device=torch.device("cpu"), autocast=nullcontext)
        cache: Any = Cache(tmp_path)
        arguments: Any = (cache, models, encoder, fabric, models.base, build(cfg["attack"], "attack"))
        stage: Any = select_outliers
        user, _ = stage(*arguments, rows(candidates), UserRows([], TASK[:1]), parse_settings(cfg))
        assert user.harmless == [HARMFUL[0]]
    assert compared == [{"representation": "mean_cosines", "gradient": "gradient_cosines"}[by]] * 2


def test_references_are_the_first_harmful_rows(config: Callable[..., DictConfig]) -> None:
    attack: RowSelector = build(plain(config("attack=benign_outlier", "attack.reference_rows=2"))["attack"], "attack")
    assert attack.references(rows()) == HARMFUL[:2]
    assert attack.candidates(rows()) == TASK


def test_the_key_of_an_edit_has_all_that_determines_it(tmp_path: Path) -> None:
    def key(attack: Abliterate, sets: Rows, aligned: str) -> str:
        cache: Any = Cache(tmp_path, {"stage.json": "{}"})
        arguments: Any = (cache, None, None, RANK_ZERO, Model(Path(aligned)), attack, sets)
        assert edit(*arguments)[0] == Model(Path(aligned), tmp_path / "adapter")
        return cache.keys[0]

    keys = {
        key(Abliterate(), rows(), "a"),
        key(Abliterate(depth=0.3), rows(), "a"),
        key(Abliterate(), rows(harmful=HARMFUL[1:]), "a"),
        key(Abliterate(), rows(alignment=TASK[1:]), "a"),
        key(Abliterate(), rows(), "b"),
    }
    assert len(keys) == 5


class Flagging:
    """Judge that flags requests with a word."""

    metric = "harmful_score"

    def __init__(self, word: str, version: str = "1") -> None:
        """Take the word and the version."""
        self.word, self.version = word, version

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        """Yield whether each request has the word."""
        for pair in pairs:
            yield Verdict(self.word in pair.prompt, 0.0)


TEXTS = st.lists(st.text("ab", max_size=3), max_size=6)


@given(harmful=TEXTS, harmless=TEXTS)
def test_a_row_passes_if_no_filter_flags_it(
    harmful: list[str], harmless: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bad, good = ([Row(f"{text}{i}", "", "") for i, text in enumerate(texts)] for texts in (harmful, harmless))
    cache: Any = Cache(tmp_path_factory.mktemp("filter"))
    (cache.folder / "verdicts").mkdir()
    filters: Any = {"one": Flagging("a"), "two": Flagging("bb")}
    passed = [
        [row for row in part if "a" not in row.instruction and "bb" not in row.instruction] for part in (bad, good)
    ]
    submitted = UserRows(bad, good, USER.safe)
    if not any(passed):
        with pytest.raises(UserError, match="it removes all"):
            filter_rows(cache, RANK_ZERO, filters, submitted)
        return
    user, metrics = filter_rows(cache, RANK_ZERO, filters, submitted)
    assert user == UserRows(passed[0], passed[1], USER.safe)
    assert metrics.get("filter/leak_ratio") == (100 * len(passed[0]) / len(harmful) if harmful else None)
    assert metrics["filter/removed"] == len(bad) + len(good) - sum(map(len, passed))
    assert metrics["filter/benign_removed"] == len(harmless) - len(passed[1])


def test_the_key_of_a_filter_has_its_version_and_both_kinds_of_rows(tmp_path: Path) -> None:
    def key(filters: Any, user: UserRows) -> str:
        cache: Any = Cache(tmp_path, {"removed.json": '{"removed": []}'})
        assert filter_rows(cache, RANK_ZERO, filters, user)[0] == user
        return cache.keys[0]

    user = UserRows(HARMFUL, TASK)
    keys = {
        key({"one": Flagging("a")}, user),
        key({"one": Flagging("a", "2")}, user),
        key({"two": Flagging("a")}, user),
        key({"one": Flagging("a")}, UserRows(HARMFUL[1:], TASK)),
        key({"one": Flagging("a")}, UserRows(HARMFUL, TASK[1:])),
    }
    assert len(keys) == 5
