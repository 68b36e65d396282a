"""`LisaMixin` in the trainers of transformers and TRL: the weights of LisaModule, the rows of StepBatches.

The program `python tests/test_hf.py MODEL FOLDER` is one of several gloo ranks, with the environment of torchrun.
"""

import json
import math
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import lisa_lightning.trainer.module
from golden.case import Rates, method_of, tiny_net
from helpers.forking import Forked
from helpers.paths import ROOT, TESTS
from helpers.recording import Recording
from helpers.training import ALIGNMENT, USER
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.interleave import Examples, StepBatches
from lisa_lightning.data.packing import IGNORED, Example, pack
from lisa_lightning.data.schedule import Schedule, State
from lisa_lightning.data.source import Row
from lisa_lightning.hf import ANCHOR_FILE, MARKER, LisaMixin, StepSampler
from lisa_lightning.method.bso import BSO
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule

GOLDEN = ROOT / "tests" / "golden"
STEPS = 11
"""Two cycles of 2 alignment and 3 user steps, and the switch after them."""
LISA: dict[str, Any] = {"alignment_steps": 2, "user_steps": 3, "rho": 1.0, "proximal_after": 0.0}
QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
ARGUMENTS: dict[str, Any] = QUIET | {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    # The loss of transformers is in float32. A smaller epsilon amplifies its rounding in gradients near 0.
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.5,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "seed": 3,
}
Weights = dict[str, Tensor]


class LisaTrainer(LisaMixin, Trainer):
    """The Trainer of transformers with Lisa."""


class PlainTrainer(Trainer):
    """The Trainer of transformers, with the rows that it is given and nothing else of Lisa."""

    order: StepSampler

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.order


def network(tiny: Path) -> Any:
    """Return the tiny model in float64, because AdamW amplifies rounding of gradients near 0."""
    lora = Lora(r=4, alpha=8, dropout=0.0, targets="all-linear")
    return attach(load(tiny, "float32"), lora, 0).double()


def short_tokenizer(tiny: Path) -> Any:
    """Return the tokenizer with a template that adds nothing to the prompt."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


def encoded(tiny: Path, rows: Sequence[Row]) -> Dataset:
    """Return the examples of LisaDataModule as a data set."""
    tokenizer = short_tokenizer(tiny)
    examples = [encode(tokenizer, "chat", row, 64) for row in rows]
    return Dataset.from_dict({"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]})


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch of rows that are padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], value: int) -> Tensor:
        return torch.tensor([v + [value] * (width - len(v)) for v in values])

    ids = [row["input_ids"] for row in rows]
    mask = padded([[1] * len(i) for i in ids], 0)
    labels = padded([row["labels"] for row in rows], IGNORED)
    return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": labels}


def trainer(tiny: Path, folder: Path, lisa: Mapping[str, Any] = LISA, **more: Any) -> LisaTrainer:
    """Return a trainer of the tiny model. Keywords are its sets, or arguments of TrainingArguments."""
    sets: dict[str, Any] = {"train_dataset": encoded(tiny, USER), "alignment_dataset": encoded(tiny, ALIGNMENT)}
    sets |= {name: more.pop(name) for name in sets if name in more}
    args = TrainingArguments(str(folder), **(ARGUMENTS | more))
    return LisaTrainer(network(tiny), args, data_collator=collate, **sets, **lisa)


def use_sgd(trainer: Any, lr: float) -> None:
    """Replace the optimizer that the arguments of a trainer choose."""
    trainer.optimizer = torch.optim.SGD(trainable(trainer.model).values(), lr=lr)


def trained(trainer: Trainer, **more: Any) -> Weights:
    trainer.train(**more)
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainable(trainer.model).items()}


def reference(tiny: Path, method: Any, sgd: bool = False, **optim: Any) -> tuple[Weights, Recording]:
    """Return the weights and metrics of LisaModule on the same rows."""
    settings: dict[str, Any] = {"lr": 5e-3, "steps": STEPS, "batch_size": 2, "schedule": "constant"}
    settings |= {"weight_decay": 0.01, "eps": 1e-3, "clip": 0.5} | optim
    recording = Recording()
    module = (_SGDModule if sgd else LisaModule)(network(tiny), method, Optim(**settings), seed=3)
    data = LisaDataModule(short_tokenizer(tiny), USER, ALIGNMENT, max_length=64)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    # The check of packed tries has no tolerance for float64.
    with patch.object(lisa_lightning.trainer.module, "choose_packing", lambda *_: pack):
        L.Trainer(logger=recording, enable_checkpointing=False, **quiet).fit(module, datamodule=data)
    return {name: weight.detach() for name, weight in trainable(module.net).items()}, recording


class _SGDModule(LisaModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.weights, lr=self.optim.lr)


def difference(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # a default of TRL
]


@pytest.mark.parametrize("cycle", [(2, 3), (0, 3), (3, 0), (1, 4)])
@pytest.mark.parametrize("world", [1, 2])
def test_the_sampler_visits_the_rows_of_step_batches_in_their_order(cycle: tuple[int, int], world: int) -> None:
    """The sampler has the order of StepBatches. A step has more rows than a stream, so that it spans epochs."""
    sizes: dict[State, int] = {"alignment": 5, "user": 9}

    def example(index: int, first: int) -> Example:
        return Example((first, index), (IGNORED, index))

    streams = {name: Examples(range(size), partial(example, first=k)) for k, (name, size) in enumerate(sizes.items())}
    batches = [
        StepBatches(streams, lambda rows: [tuple(rows)], BSO(*cycle), 12, 3, 2, seed=7, rank=rank, world=world)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    rows = {"alignment": torch.arange(9, 14).numpy(), "user": torch.arange(9).numpy()}
    drawn = list(StepSampler(rows, Schedule(*cycle), 6 * world, 12, 7))  # type: ignore[arg-type]
    assert len(drawn) == 12 * 6 * world
    for t in range(12):
        shares = [e for share in batches for micro in share[t].main.micro_batches for rows in micro for e in rows]  # type: ignore[attr-defined]
        expected = [index if first else 9 + index for first, index in (e.ids for e in shares)]
        assert drawn[t * 6 * world : (t + 1) * 6 * world] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "sgd"), [(1, False), (2, False), (2, True)])
def test_the_weights_equal_those_of_lisa_module(tiny: Path, tmp_path: Path, accumulate: int, sgd: bool) -> None:
    lr = 0.5 if sgd else 5e-3
    expected, recording = reference(tiny, Lisa(**LISA), sgd, accumulate=accumulate, lr=lr)
    hf = trainer(tiny, tmp_path, gradient_accumulation_steps=accumulate, learning_rate=lr)
    if sgd:
        use_sgd(hf, lr)
    start = {name: weight.detach().clone() for name, weight in trainable(hf._module).items()}
    weights = trained(hf)
    assert difference(weights, expected) < 1e-6
    assert difference(weights, start) > 1e-2
    logs = [row for row in hf.state.log_history if "loss" in row]
    for name, metric in (("loss", "train/loss"), ("proximal/drift", "proximal/drift")):
        assert [row[name] for row in logs] == pytest.approx(recording.values(metric), abs=1e-5), name
    assert any(row["grad_norm"] > 0.5 for row in logs)  # clipped after the penalty


@pytest.mark.slow
def test_rho_0_is_plain_alternation_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    lisa = trainer(tiny, tmp_path, LISA | {"rho": 0.0}, gradient_accumulation_steps=2)
    args = TrainingArguments(str(tmp_path), **ARGUMENTS, gradient_accumulation_steps=2)
    plain = PlainTrainer(network(tiny), args, data_collator=collate, train_dataset=lisa.train_dataset)
    plain.order = lisa._get_train_sampler()
    without = trained(plain)
    assert difference(trained(lisa), without) == 0
    assert difference(trained(trainer(tiny, tmp_path, gradient_accumulation_steps=2)), without) > 1e-3


def test_the_penalty_starts_after_its_share_of_the_steps(tiny: Path, tmp_path: Path) -> None:
    """A penalty that starts after 60 % of the steps equals LisaModule's. Step 6 of 10 has none yet."""
    lisa: dict[str, Any] = {**LISA, "proximal_after": 0.6}
    expected, _ = reference(tiny, Lisa(**lisa), steps=10)
    assert difference(trained(trainer(tiny, tmp_path, lisa, max_steps=10)), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_resuming_in_the_middle_of_a_state_changes_no_bit(tiny: Path, tmp_path: Path, step: int) -> None:
    """Weights and anchor after a resumption equal those of the straight run. The switches are at 2, 5 and 7."""
    make = partial(trainer, tiny, tmp_path, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    straight = make()
    expected = trained(straight)
    resumed = make()
    assert difference(trained(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")), expected) == 0
    assert straight.anchor
    assert resumed.anchor
    assert all(torch.equal(a, b) for a, b in zip(straight.anchor, resumed.anchor, strict=True))


def test_a_second_training_starts_with_a_new_anchor(tiny: Path, tmp_path: Path) -> None:
    hf = trainer(tiny, tmp_path, LISA | {"alignment_steps": 0}, max_steps=3)
    weights = trained(hf)
    hf.train()
    assert hf.anchor
    assert all(torch.equal(a, w.float()) for a, w in zip(hf.anchor, weights.values(), strict=True))


@pytest.fixture
def two_ranks(tiny: Path, tmp_path: Path, forked: Forked) -> Callable[[], None]:
    """Return a function that runs this file on two gloo ranks."""

    def start() -> list[int]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PYTHONPATH": str(TESTS)}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [forked.start([str(tiny), str(tmp_path)], tmp_path, env, "test_hf") for env in ranks]

    def run() -> None:
        for done in map(forked.wait, start()):
            assert done.returncode == 0, done.stderr

    return run


def main(tiny: Path, folder: Path) -> None:
    """Train on this rank, then resume at step 4, in the middle of a state; write the weights of each rank."""
    torch.set_num_threads(1)
    make = partial(trainer, tiny, folder, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    rank = os.environ["RANK"]
    straight = make(save_strategy="steps", save_steps=4, ddp_backend="gloo")
    assert straight.args.world_size == 2
    save_file(trained(straight), folder / f"straight_{rank}.safetensors")
    resumed = make(ddp_backend="gloo")
    weights = trained(resumed, resume_from_checkpoint=str(folder / "checkpoint-4"))
    save_file(weights, folder / f"resumed_{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one_and_resume(
    tiny: Path, tmp_path: Path, two_ranks: Callable[[], None]
) -> None:
    two_ranks()
    expected, _ = reference(tiny, Lisa(**LISA), accumulate=2)
    weights = load_file(tmp_path / "straight_0.safetensors")
    assert difference(weights, expected) < 1e-6
    for other in ("straight_1", "resumed_0", "resumed_1"):
        assert difference(load_file(tmp_path / f"{other}.safetensors"), weights) == 0, other


class _Weights(TrainerCallback):
    """Callback that stores the weights before every step."""

    def __init__(self) -> None:
        self.before: list[Weights] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = trainable(kwargs["model"])
        self.before.append({name: weight.detach().clone() for name, weight in weights.items()})


class _Recorded(LisaTrainer):
    """Trainer on the recorded batches in their order. An item of its data set is a batch."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(range(self.args.max_steps))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lisa", "lisa_rho01_k2_7", "bso", "proximal_only", "alignment_only"])
def test_equals_the_official_run(case: str, tmp_path: Path) -> None:
    facts = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    method, rates = method_of(facts), Rates.of_case(facts, len(facts["steps"]))
    names = ("input_ids", "labels", "attention_mask")
    batches = [
        {name: tensors[f"step{t:03d}.{fact['state']}.{name}"] for name in names}
        for t, fact in enumerate(facts["steps"])
    ]
    options = {"learning_rate": rates.lr, "lr_scheduler_type": rates.schedule, "weight_decay": rates.weight_decay}
    options |= {"max_steps": len(batches), "per_device_train_batch_size": 1, "max_grad_norm": facts["max_grad_norm"]}
    options["adam_epsilon"] = 1e-8
    options["warmup_steps"] = 0 if rates.schedule == "constant" else math.ceil(rates.warmup_ratio * len(batches))
    weights = _Weights()
    hf = _Recorded(
        tiny_net(facts, tensors).double(),
        TrainingArguments(str(tmp_path), **(ARGUMENTS | options)),
        data_collator=lambda items: items[0],
        train_dataset=batches,
        alignment_dataset=batches,
        alignment_steps=method.schedule.alignment_steps,
        user_steps=method.schedule.user_steps,
        rho=getattr(method, "rho", 0.0),
        proximal_after=getattr(method, "proximal_after", 0.0),
        callbacks=[weights],
    )
    final = trained(hf)
    errors = [final[n.removeprefix("final.")] - w for n, w in tensors.items() if n.startswith("final.")]
    for step, before in enumerate(weights.before):
        recorded = {name: tensors.get(f"before{step:03d}.{name}") for name in before}
        errors += [before[name] - weight for name, weight in recorded.items() if weight is not None]
    assert len(errors) > len(final)
    assert max(float(error.abs().max()) for error in errors) < 1e-6


def test_epochs_count_passes_over_the_user_rows(tiny: Path, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), **(ARGUMENTS | {"max_steps": -1, "num_train_epochs": 1.5}))
    make = partial(LisaTrainer, network(tiny), args, data_collator=collate, alignment_dataset=encoded(tiny, ALIGNMENT))
    hf = make(train_dataset=encoded(tiny, USER), **LISA)  # type: ignore[arg-type]
    hf.train()
    assert hf.state.global_step == 8  # 9 rows are 5 steps of 2
    assert args.max_steps == -1


@pytest.mark.slow
def test_other_sets_and_settings_of_the_loader_draw_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    expected = trained(trainer(tiny, tmp_path))
    assert difference(trained(trainer(tiny, tmp_path, dataloader_drop_last=True)), expected) == 0
    lists: dict[str, Any] = {
        "train_dataset": list(encoded(tiny, USER)),
        "alignment_dataset": list(encoded(tiny, ALIGNMENT)),
    }
    hf = trainer(tiny, tmp_path, **lists)
    assert len(hf.train_dataset) == len(USER) + len(ALIGNMENT)  # type: ignore[arg-type]
    assert difference(trained(hf), expected) == 0


REFUSED = {
    "group_by_length": ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length: "),
    "split batches": ({"accelerator_config": {"split_batches": True}}, "split_batches=True: "),
    "auto batch size": ({"auto_find_batch_size": True}, "auto_find_batch_size=True: "),
    "no skipping": ({"ignore_data_skip": True}, "ignore_data_skip=True: "),
    "no alignment rows": (
        {"alignment_dataset": Dataset.from_dict({"input_ids": [], "labels": []})},
        r"alignment_dataset: it has no rows, and alignment_steps=2 draws some. Fix: alignment_steps=0",
    ),
    "other columns": (
        {"alignment_dataset": Dataset.from_dict({"text": ["a"]})},
        "alignment_dataset: its columns are text, and those of train_dataset input_ids, labels. Fix: ",
    ),
    "other types": (
        {"alignment_dataset": Dataset.from_dict({"input_ids": ["a"], "labels": ["b"]})},
        r"alignment_dataset: its columns have other types.*Fix: alignment_dataset.cast\(train_dataset.features\)",
    ),
    "streaming": (
        {"train_dataset": Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()},
        "train_dataset=IterableDataset: .* Fix: load it without streaming",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_conflicts_with_the_schedule_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        trainer(tiny, tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rho": -1.0}, r"LisaMixin.rho=-1.0 is not allowed; it must be a number of at least 0"),
        ({"alignment_steps": 0, "user_steps": 0}, "at least one must be positive"),
    ],
)
def test_a_wrong_setting_is_refused(tiny: Path, tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tiny, tmp_path, LISA | setting)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("is_deepspeed_enabled", "deepspeed: .*Fix: train with DDP"),
        ("is_fsdp_enabled", "fsdp: .*Fix: train with DDP"),
        ("accelerator.scaler", "fp16=True: .*Fix: bf16=True"),
        ("args.parallelism_config", "parallelism_config: .*Fix: train with DDP"),
    ],
)
def test_what_needs_other_hardware_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, message: str
) -> None:
    """Options that need other hardware are refused.

    The attribute is set as the Trainer sets it on such a machine, since this machine has no such hardware.
    """
    created = Trainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        created(self)
        owner, _, name = attribute.rpartition(".")
        setattr(getattr(self, owner) if owner else self, name, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    monkeypatch.setattr(TrainingArguments, "__setattr__", object.__setattr__, raising=False)
    with pytest.raises(UserError, match=message):
        trainer(tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", f"cannot read {ANCHOR_FILE} .*Fix: resume from another checkpoint"),
        ("cut", f"cannot read {ANCHOR_FILE} .*Fix: resume from another checkpoint"),
        ("no settings", f"cannot read {ANCHOR_FILE} .*Fix: resume from another checkpoint"),
        ("settings", r"other settings \(rho: 1.0 saved, 2.0 now\).*Fix: "),
        ("weights", "its anchor has other names or shapes .*Fix: "),
    ],
)
def test_a_checkpoint_without_its_anchor_is_refused(tiny: Path, tmp_path: Path, damage: str, message: str) -> None:
    trained(trainer(tiny, tmp_path, max_steps=3, save_strategy="steps", save_steps=3))
    file = tmp_path / "checkpoint-3" / ANCHOR_FILE
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no settings":
        save_file(load_file(file), file)
    elif damage == "weights":
        resumed = trainer(tiny, tmp_path)
        save_file({"other": torch.zeros(2)}, file, {"settings": json.dumps(resumed._run_settings())})
    hf = trainer(tiny, tmp_path, LISA | {"rho": 2.0} if damage == "settings" else LISA)
    with pytest.raises(UserError, match=f"resume_from_checkpoint=.*checkpoint-3: .*{message}"):
        hf.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.fixture
def sft(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a maker of TRL's trainer with Lisa; keywords are its arguments, or those of SFTConfig."""
    trl: Any = pytest.importorskip("trl")
    monkeypatch.setenv("CI", "true")  # without telemetry

    class LisaSFTTrainer(LisaMixin, trl.SFTTrainer):
        """TRL's trainer with Lisa."""

    def make(user: Dataset, alignment: Dataset, model: Any = None, peft_config: Any = None, **more: Any) -> Any:
        options = ARGUMENTS | {"max_length": 64, "bf16": False} | more
        args = trl.SFTConfig(str(tmp_path), **options)
        sets = {"train_dataset": user, "alignment_dataset": alignment}
        tokenizer = short_tokenizer(tiny)
        return LisaSFTTrainer(
            network(tiny) if model is None else model,
            args,
            **sets,
            **LISA,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


TEXTS = {"user": ("user row", 9), "alignment": ("alignment row", 5)}


def texts(stream: str) -> Dataset:
    name, count = TEXTS[stream]
    prompts, completions = zip(*((f"{name} {i}: ", name[:4] * (i % 3 + 1)) for i in range(count)), strict=True)
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def test_trl_trains_the_weights_of_lisa_module(tiny: Path, sft: Callable[..., Any]) -> None:
    """TRL trains the weights of LisaModule. The optimizer is SGD, because the loss of TRL is in float32."""
    expected, _ = reference(tiny, Lisa(**LISA), sgd=True, accumulate=2, lr=0.5)
    hf = sft(encoded(tiny, USER), encoded(tiny, ALIGNMENT), gradient_accumulation_steps=2, learning_rate=0.5)
    use_sgd(hf, 0.5)
    assert difference(trained(hf), expected) < 1e-6


def test_trl_prepares_both_sets_alike_and_resumes(tiny: Path, tmp_path: Path, sft: Callable[..., Any]) -> None:
    """The streams stay apart although TRL drops a row and shuffles the order."""
    from peft import LoraConfig

    cut_off = {"prompt": ["long " * 60], "completion": ["cut"]}
    user = Dataset.from_dict({k: texts("user")[k][:] + v for k, v in cut_off.items()})
    saving = {"save_strategy": "steps", "save_steps": 4, "shuffle_dataset": True}

    def make() -> Any:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return sft(user, texts("alignment"), load(tiny, "float32"), lora, **saving)

    hf = make()
    assert len(hf.train_dataset) == 9 + 5
    assert MARKER not in hf.train_dataset.column_names
    tokenizer = load_tokenizer(tiny)
    for stream, indices in hf.stream_rows.items():
        rows = [hf.train_dataset[int(i)] for i in indices]
        assert all(str(tokenizer.decode(row["input_ids"])).startswith(f"{stream} row") for row in rows)
        assert all(row["labels"][0] == IGNORED and row["labels"][-1] != IGNORED for row in rows)
        assert len(rows) == TEXTS[stream][1]
    expected = trained(hf)
    assert difference(trained(make(), resume_from_checkpoint=str(tmp_path / "checkpoint-4")), expected) == 0


def test_trl_packing_is_refused(sft: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"packing=True: .*Fix: packing=False"):
        sft(texts("user"), texts("alignment"), packing=True)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_the_trl_example_trains(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(sys, "argv", ["trl_lisa.py", str(tiny)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "trl_lisa.py"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
