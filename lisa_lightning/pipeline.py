"""The stages of a run in order, each cached by a hash of all that determines it."""

import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, astuple
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lisa_lightning import report
from lisa_lightning.base_model import base_model
from lisa_lightning.cache import build, cache_folder, digest, explained, write_text
from lisa_lightning.cpu import keep_freed_memory
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.interleave import Examples, StepBatches
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.source import Row, Rows, load_rows
from lisa_lightning.errors import UserError
from lisa_lightning.evaluate.evaluator import Answer, Evaluator, Question, questions, scores, to_jsonl
from lisa_lightning.loss import choose_packing
from lisa_lightning.module import LisaModule, Optim, refuse_other_run
from lisa_lightning.net import attach, load, load_tokenizer, save_adapter, save_merged
from lisa_lightning.schedule import State
from lisa_lightning.tracking import Tracker, read_rows, wandb_init
from lisa_lightning.training import Checkpoint, EvaluateCurve, Record, fit

log = logging.getLogger(__name__)
Metrics = dict[str, Any]
MAY_CHANGE = ("resume", "cache_dir", "stages", "wandb", "checkpoint")  # between a run and its resumption


def run(cfg: DictConfig) -> Metrics:
    """Run the stages of `cfg` into Hydra's output folder and return what metrics.json holds.

    Raises:
        UserError: what the user can put right; see the modules that each stage calls.
    """
    started = perf_counter()
    hydra = HydraConfig.get()
    task = instantiate(cfg.task)
    rows = load_rows(cfg.source, task)
    user = user_rows(rows.task, rows.harmful, cfg.data.n, cfg.harmful_ratio, cfg.data.order, cfg.seed)
    _hush()
    keep_freed_memory()
    fabric = _ranks(cfg.trainer)
    if getattr(rank_zero_only, "rank", 0) == 0:  # before the other ranks are there to wait
        _claim(Path(hydra.runtime.output_dir), cfg)
    fabric.launch()  # every rank runs all stages from here on, so that evaluation is shared out too
    out = Path(fabric.broadcast(hydra.runtime.output_dir))
    base, base_key = base_model(fabric, cfg.model, cache_folder(cfg.cache_dir))

    choices = {name: str(choice) for name, choice in hydra.runtime.choices.items() if not name.startswith("hydra/")}
    tracker = Tracker(out, wandb_init(_plain(cfg), choices), cfg.resume) if fabric.is_global_zero else None
    failed = True
    try:
        metrics = Stages(cfg, out, fabric, tracker, task, rows, user, base, base_key).run()
        metrics["time/total_s"] = perf_counter() - started
        if tracker is not None:
            _leave(cfg, out, tracker, metrics, choices)
        failed = False
    finally:
        if tracker is not None:
            tracker.finish(failed)
    return metrics


def _ranks(cfg: Any) -> Fabric:
    """The processes of this run, not yet launched."""
    try:
        return Fabric(
            accelerator=cfg.accelerator,
            devices=cfg.devices,
            num_nodes=cfg.num_nodes,
            strategy=cfg.strategy,
            precision=cfg.precision,
        )
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        asked = f"trainer.accelerator={cfg.accelerator}, trainer.devices={cfg.devices}"
        raise UserError(f"{asked} can't be had on this machine: {str(error).splitlines()[0]}") from error


class Stages:
    """align -> finetune -> evaluate on one set of ranks; a stage found finished in the cache is not run again."""

    def __init__(
        self,
        cfg: DictConfig,
        out: Path,
        fabric: Fabric,
        tracker: Tracker | None,
        task: Any,
        rows: Rows,
        user: list[Row],
        base: Path,
        base_key: str,
    ) -> None:
        self.cfg = cfg
        self.out = out
        self.fabric = fabric
        self.tracker = tracker
        self.rows = rows
        self.user = user
        self.cache = cache_folder(cfg.cache_dir)
        self.base = base
        self.base_key = base_key
        self.tokenizer = load_tokenizer(base)
        self.evaluator = Evaluator(fabric, self.tokenizer, task, cfg.evaluate)
        self.origin = {
            "code": _code_digest(),
            "device": fabric.device.type,
            "precision": cfg.trainer.precision,
            "ranks": fabric.world_size,
            "dtype": cfg.model.dtype,
            "base": base_key,
        }
        self.origin |= {package: version(package) for package in ("torch", "transformers", "peft", "lightning")}

    def run(self) -> Metrics:
        """The chosen stages; without `align` the base model stands for the aligned one."""
        cfg, metrics, answers = self.cfg, {"seed": self.cfg.seed}, []
        aligned = self.base
        if "align" in cfg.stages:
            aligned, seconds = self._align()
            metrics["time/align_s"] = seconds
        evaluate = "evaluate" in cfg.stages
        if evaluate:
            found, seconds = self._evaluate("aligned", aligned, None)
            answers, metrics["time/evaluate_s"] = found, seconds
            metrics |= {f"aligned/{name}": value for name, value in scores(found).items()}
        if "finetune" in cfg.stages:
            finetuned, seconds = self._finetune(aligned)
            metrics |= {"time/finetune_s": seconds, "train/steps": cfg.optim.steps}
            if evaluate:
                found, seconds = self._evaluate("final", aligned, finetuned / "adapter")
                answers += found
                metrics["time/evaluate_s"] += seconds
                metrics |= {f"final/{name}": value for name, value in scores(found).items()}
        if self.fabric.is_global_zero and answers:
            write_text(self.out / "responses.jsonl", to_jsonl(answers))
        return metrics

    def _align(self) -> tuple[Path, float]:
        """The aligned model: LoRA on the alignment rows, merged into the base."""
        cfg = self.cfg.align
        key = self.origin | {
            "align": _plain(cfg),
            "rows": _rows_digest(self.rows.alignment),
            "max_length": self.cfg.data.max_length,
        }

        def make(folder: Path) -> None:
            # The provider sees its own rows only; to the loop they are the one stream there is.
            module, checkpoint = self._fit("align", cfg, cfg.seed, key, self.base, self.rows.alignment, [], False)
            if self.fabric.is_global_zero:
                save_merged(module.net, self.tokenizer, folder)
                self._record("align", folder, checkpoint)

        return self._stage("align", key, make)

    def _finetune(self, aligned: Path) -> tuple[Path, float]:
        """The user's fine-tuning under the chosen method: a folder with the adapter."""
        cfg = self.cfg
        key = self.origin | {
            "aligned": aligned.name,
            "method": _plain(cfg.method),
            "lora": _plain(cfg.lora),
            "optim": _plain(cfg.optim),
            "seed": cfg.seed,
            "during_alignment": cfg.data.during_alignment,
            "max_length": cfg.data.max_length,
            "user_rows": _rows_digest(self.user),
            "alignment_rows": _rows_digest(self.rows.alignment),
            "curve": self._asking(self._curve_questions()) | {"every": cfg.evaluate.every}
            if cfg.evaluate.every
            else None,
        }

        def make(folder: Path) -> None:
            discard = cfg.data.during_alignment == "discard"
            callbacks = []
            if cfg.evaluate.every:
                callbacks.append(EvaluateCurve(self.evaluator, self._curve_questions(), cfg.evaluate.every))
            module, checkpoint = self._fit("finetune", cfg, cfg.seed, key, aligned, self.user, callbacks, discard)
            if self.fabric.is_global_zero:
                save_adapter(module.net, str(aligned), folder / "adapter")
                self._record("finetune", folder, checkpoint)

        folder, seconds = self._stage("finetune", key, make)
        if self.fabric.is_global_zero:
            with explained(self.out):
                shutil.copytree(folder / "adapter", self.out / "adapter", dirs_exist_ok=True)
        return folder, seconds

    def _fit(
        self,
        stage: str,
        cfg: Any,
        seed: int,
        key: Metrics,
        base: Path,
        rows: Sequence[Row],
        callbacks: list[Any],
        discard: bool,
    ) -> tuple[LisaModule, Checkpoint]:
        """Train a fresh adapter on `base`; `cfg` holds method, lora and optim."""
        optim = Optim(**_plain(cfg.optim))
        method = instantiate(cfg.method)
        net = attach(load(base, self.cfg.model.dtype), cfg.lora, seed)
        module = LisaModule(net, method, optim, seed, key)
        encoded = partial(encode, self.tokenizer, max_length=self.cfg.data.max_length)
        streams: dict[State, Examples] = {
            "user": Examples(rows, encoded),
            "alignment": Examples(self.rows.alignment, encoded),
        }
        packing = choose_packing(net.get_base_model(), self.cfg.data.max_length)
        steps = StepBatches(
            streams, packing, method.schedule, optim.steps, optim.batch_size, optim.accumulate, seed, discard=discard
        )
        checkpoint = Checkpoint(self.out / "checkpoints" / f"{stage}.ckpt", self.cfg.checkpoint.every, optim.steps)
        record = Record(self.tracker, stage)
        fit(module, LisaDataModule(steps), self.cfg.trainer, checkpoint, [*callbacks, record], stage)
        return module, checkpoint

    def _evaluate(self, stage: str, model: Path, adapter: Path | None) -> tuple[list[Answer], float]:
        """All held-out questions, answered and judged."""
        asked = questions(self.rows)
        key = (
            self.origin
            | {
                "model": model.name,
                "adapter": adapter and adapter.parent.name,
                "stage": stage,
            }
            | self._asking(asked)
        )

        def make(folder: Path) -> None:
            started = perf_counter()
            net: Any = load(model, self.cfg.model.dtype)
            if adapter is not None:
                from peft import PeftModel

                net = PeftModel.from_pretrained(net, adapter).merge_and_unload()
            net.to(self.fabric.device)
            journal = self.out / "answers" / f"{stage}-{digest(key)}"
            journal.parent.mkdir(exist_ok=True)
            answers = self.evaluator.answers(net, asked, stage, journal)
            if self.fabric.is_global_zero:
                write_text(folder / "responses.jsonl", to_jsonl(answers))
                write_text(folder / "stage.json", json.dumps({"seconds": perf_counter() - started}))

        folder, seconds = self._stage("evaluate", key, make)
        lines = (folder / "responses.jsonl").read_text(encoding="utf-8").split("\n")
        return [Answer(**json.loads(line)) for line in lines if line], seconds

    def _stage(self, name: str, key: Metrics, make: Any) -> tuple[Path, float]:
        """The finished folder of a stage, and the seconds that it took when it ran."""
        built = False

        def building(folder: Path) -> None:
            nonlocal built
            built = True
            make(folder)

        folder = build(self.fabric, self.cache / name, key, building)
        if not built and self.tracker is not None and (folder / "curves.csv").exists():
            self.tracker.take_over(read_rows(folder / "curves.csv"))
        return folder, json.loads((folder / "stage.json").read_text())["seconds"]

    def _record(self, stage: str, folder: Path, checkpoint: Checkpoint) -> None:
        """Keep a training stage's curves and time with its result."""
        assert self.tracker is not None
        self.tracker.curves.export(stage, folder / "curves.csv")
        write_text(folder / "stage.json", json.dumps({"seconds": checkpoint.seconds}))

    def _asking(self, asked: list[Question]) -> Metrics:
        """All that determines the verdicts on a model's answers."""
        return {
            "questions": digest([asdict(q) for q in asked]),
            "task": _plain(self.cfg.task),
            "max_new_tokens": self.cfg.evaluate.max_new_tokens,
            "batch_size": self.cfg.evaluate.batch_size,
            "judge": self.evaluator.judge.version,
        }

    def _curve_questions(self) -> list[Question]:
        cfg = self.cfg.evaluate
        return questions(self.rows, harmful=cfg.curve_prompts, harmless=0, task=cfg.curve_rows)


def _claim(out: Path, cfg: DictConfig) -> None:
    """Make the output folder ours: refuse one that holds another run, write down the config."""
    used = any((out / name).exists() for name in ("checkpoints", "curves.csv", "metrics.json"))
    if used and not cfg.resume:
        raise UserError(f"{out} holds a run; add resume=true to go on with it, or give another hydra.run.dir")
    if cfg.resume and not used:
        log.warning("Nothing to resume in %s: the run starts anew.", out)
    if used and (out / "config.yaml").exists():
        saved, wanted = OmegaConf.to_container(OmegaConf.load(out / "config.yaml")), _plain(cfg)
        assert isinstance(saved, dict)
        refuse_other_run(*({k: v for k, v in c.items() if k not in MAY_CHANGE} for c in (saved, wanted)))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def _leave(cfg: DictConfig, out: Path, tracker: Tracker, metrics: Metrics, choices: dict[str, str]) -> None:
    """Everything that a person looks at: metrics.json, report.html, the W&B summary, the table in the terminal."""
    path = out / "responses.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    answers = [json.loads(line) for line in lines if line]
    write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    report.page(out, metrics, tracker.curves.rows(), answers, choices, OmegaConf.to_yaml(cfg, resolve=True))
    tracker.summarize(metrics, report.samples(answers))
    report.terminal(out, metrics, tracker.offline_folder, tracker.url)


def _plain(cfg: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def _rows_digest(rows: Sequence[Row]) -> str:
    found = sha256()
    for row in rows:  # one at a time: there may be millions
        found.update(json.dumps(astuple(row)).encode() + b"\n")
    return found.hexdigest()[:16]


def _code_digest() -> str:
    """Of every module that can change a result, so that a cache never outlives the code that filled it."""
    package = Path(__file__).parent
    files = [f for f in sorted(package.rglob("*.py")) if "report" not in f.relative_to(package).parts]
    return sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def _hush() -> None:
    """Keep libraries' greetings out of the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for known in ("`is_gradient_checkpointing` is deprecated", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=known)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
