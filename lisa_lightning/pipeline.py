"""The stages of a run in order, each cached by a hash of all that determines it."""

import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel

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
from lisa_lightning.evaluate.alpaca_eval import alpaca_eval_outputs
from lisa_lightning.evaluate.evaluator import Answer, Evaluator, Question, questions, read_answers, write_answers
from lisa_lightning.evaluate.judging import judge_answers, read_judged, read_responses
from lisa_lightning.evaluate.scores import judged_scores, task_scores, verdict
from lisa_lightning.judges.embedded import EmbeddedJudge
from lisa_lightning.judges.judge import Judge
from lisa_lightning.judges.linear import LinearJudge
from lisa_lightning.judges.refusal import RefusalJudge
from lisa_lightning.loss import choose_packing
from lisa_lightning.module import LisaModule, Optim, refuse_other_run
from lisa_lightning.net import (
    attach,
    attach_saved,
    load,
    load_tokenizer,
    merged,
    named,
    refuse_quantization,
    save_adapter,
    save_merged,
)
from lisa_lightning.schedule import State
from lisa_lightning.tasks.task import Scored
from lisa_lightning.tracking import CurveRow, Tracker, read_rows, wandb_init
from lisa_lightning.training import Checkpoint, EvaluateCurve, Record, fit

log = logging.getLogger(__name__)
Metrics = dict[str, Any]
Judges = Mapping[str, Judge]
MAY_CHANGE = (
    "resume",
    "cache_dir",
    "stages",
    "wandb",
    "checkpoint",
    "judge",
    "responses",
)  # between a run and its resumption


def run(cfg: DictConfig) -> Metrics:
    """Run the stages of `cfg` into Hydra's output folder and return what metrics.json holds.

    Raises:
        UserError: what the user can put right; see the modules that each stage calls.
    """
    started = perf_counter()
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    judges: Judges = {name: instantiate(judge) for name, judge in cfg.judge.items()} if "judge" in cfg.stages else {}
    _hush()
    if list(cfg.stages) == ["judge"]:
        return _judge_stored(cfg, out, judges)
    task = get_class(cfg.task._target_)()
    rows = load_rows(cfg.source, task, cfg.data.allow_overlap)
    user = user_rows(rows, cfg.data.n, cfg.harmful_ratio, cfg.data.order, cfg.seed, cfg.data.safe_rows)
    if cfg.model.quantize is not None:
        refuse_quantization()
    keep_freed_memory()
    fabric = _ranks(cfg.trainer)
    if getattr(rank_zero_only, "rank", 0) == 0:  # before the other ranks are there to wait
        _claim(out, cfg)
    fabric.launch()  # every rank runs all stages from here on, so that evaluation is shared out too
    out = Path(fabric.broadcast(str(out)))
    base, base_key = base_model(fabric, cfg.model, cache_folder(cfg.cache_dir))

    choices = {name: str(choice) for name, choice in hydra.runtime.choices.items() if not name.startswith("hydra/")}
    tracker = Tracker(out, wandb_init(_plain(cfg), choices), cfg.resume) if fabric.is_global_zero else None
    failed = True
    try:
        stages = Stages(cfg, out, fabric, tracker, task, rows, user, base, base_key)
        metrics = stages.run()
        if tracker is not None:  # judging is done by the first rank; the others have nothing left to do
            if judges:
                metrics |= _judge(judges, stages.answered, out, cfg)
            metrics["time/total_s"] = perf_counter() - started
            _leave(cfg, out, tracker, metrics, choices)
        failed = False
    finally:
        if tracker is not None:
            tracker.finish(failed)
    return metrics


def _judge(judges: Judges, answers: Sequence[Answer], out: Path, cfg: DictConfig) -> Metrics:
    """Judge the answers. A score stands under its judge's name, and without it for the first judge that gives it."""
    started = perf_counter()
    cache = cache_folder(cfg.cache_dir)
    judged = judge_answers(judges, answers, out, cache)
    told = any(j.refused is not None for j in judged if j.kind == "harmless" and j.judge in judges)
    if not told and any(a.kind == "harmless" for a in answers):
        judges = {**judges, "refusal": RefusalJudge()}  # a model that refuses everything must not look safe
        judged = judge_answers(judges, answers, out, cache)
    for judge in judges.values():
        if isinstance(judge, LinearJudge):
            for name, text in judge.card().items():
                write_text(out / name, text)
    found: Metrics = {}
    others = [name for name in dict.fromkeys(j.judge for j in judged) if name not in judges]
    for name in [*others, *reversed(list(judges))]:
        for stage in dict.fromkeys(j.stage for j in judged):
            scores = judged_scores([j for j in judged if (j.stage, j.judge) == (stage, name)])
            found |= {f"{stage}/{name}/{metric}": value for metric, value in scores.items()}
            if name in judges:
                found |= {f"{stage}/{metric}": value for metric, value in scores.items()}
    return found | {"judges": list(judges), "time/judge_s": perf_counter() - started}


def _judge_stored(cfg: DictConfig, out: Path, judges: Judges) -> Metrics:
    """Judge a file of answers, or anew those of the run that the output folder holds; nothing is generated."""
    answers = read_responses(cfg.responses) if cfg.responses is not None else read_answers(out / "responses.jsonl")
    if not answers:
        raise UserError(
            f"{out} holds no answers to judge; name a run's folder as hydra.run.dir=FOLDER, or a file as responses=FILE"
        )
    metrics = _read_json(out / "metrics.json") | _judge(judges, answers, out, cfg)
    write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    if cfg.responses is None and (out / "choices.json").exists():
        _page(out, metrics, read_rows(out / "curves.csv"), _read_json(out / "choices.json"))
    report.terminal(out, metrics, None, None)
    return metrics


def _read_json(path: Path) -> Metrics:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
        self.task = task
        self.limits = {
            "harmful": cfg.evaluate.max_new_tokens,
            "harmless": cfg.evaluate.max_new_tokens,
            "task": cfg.task.max_new_tokens,
        }
        self.evaluator = Evaluator(fabric, self.tokenizer, cfg.model.template, self.limits, cfg.evaluate.batch_size)
        self.answered: list[Answer] = []
        """The answers of all stages, when they have run."""
        self.origin = {
            "code": _code_digest(),
            "device": fabric.device.type,
            "precision": cfg.trainer.precision,
            "ranks": fabric.world_size,
            "model": {k: cfg.model[k] for k in ("dtype", "attention", "template", "adapters", "quantize")},
            "base": base_key,
        }
        self.origin |= {package: version(package) for package in ("torch", "transformers", "peft", "lightning")}

    def run(self) -> Metrics:
        """The chosen stages; without `align` the base model stands for the aligned one."""
        cfg = self.cfg
        metrics: Metrics = {"seed": cfg.seed, "rows/overlap": sum(self.rows.overlap.values())}
        metrics |= {f"rows/overlap/{pair}": count for pair, count in self.rows.overlap.items()}
        model = Model(self.base, None)
        if "align" in cfg.stages:
            model, metrics["time/align_s"] = self._align()
        if "evaluate" in cfg.stages:
            metrics |= self._evaluate("aligned", model)
        if "finetune" in cfg.stages:
            model, metrics["time/finetune_s"] = self._finetune(model)
            metrics["train/steps"] = self._steps(cfg.optim, len(self.user))
            if "evaluate" in cfg.stages:
                seconds = metrics["time/evaluate_s"]
                metrics |= self._evaluate("final", model)
                metrics["time/evaluate_s"] += seconds
        return metrics

    def _align(self) -> tuple["Model", float]:
        """The aligned model: LoRA on the alignment rows, merged into the base or kept beside it to go on with."""
        cfg = self.cfg.align
        key = self.origin | {
            "align": _plain(cfg),
            "rows": _rows_digest(self.rows.alignment),
            "max_length": self.cfg.data.max_length,
        }

        def make(folder: Path) -> None:
            # The provider sees its own rows only; to the loop they are the one stream there is.
            net = self._attach(Model(self.base, None), cfg)
            checkpoint = self._fit("align", cfg, net, cfg.seed, key, self.rows.alignment, [], False)
            if self.fabric.is_global_zero:
                save_adapter(net, str(self.base), folder / "adapter")
                if self.cfg.model.adapters == "stacked":
                    if self.cfg.model.quantize is not None:  # 4-bit weights can't take the adapter in
                        net = attach_saved(self._load(self.base, None), folder / "adapter")
                    save_merged(net, self.tokenizer, folder)
                self._record("align", folder, checkpoint)

        folder, seconds = self._stage("align", key, make)
        stacked = self.cfg.model.adapters == "stacked"
        return Model(folder, None) if stacked else Model(self.base, folder / "adapter"), seconds

    def _finetune(self, aligned: "Model") -> tuple["Model", float]:
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
            "curve": None,
        }
        callbacks = []
        if cfg.evaluate.every:
            asked = questions(self.rows, cfg.evaluate.curve_prompts, 0, cfg.evaluate.curve_rows)
            judge = EmbeddedJudge()
            callbacks.append(EvaluateCurve(self.evaluator, judge, self.task, asked, cfg.evaluate.every))
            key["curve"] = self._asking(asked) | {"every": cfg.evaluate.every, "judge": judge.version}

        def make(folder: Path) -> None:
            discard = cfg.data.during_alignment == "discard"
            net = self._attach(aligned, cfg)
            checkpoint = self._fit("finetune", cfg, net, cfg.seed, key, self.user, callbacks, discard)
            if self.fabric.is_global_zero:
                save_adapter(net, str(aligned.folder), folder / "adapter")
                self._record("finetune", folder, checkpoint)

        folder, seconds = self._stage("finetune", key, make)
        if self.fabric.is_global_zero:
            with explained(self.out):
                shutil.copytree(folder / "adapter", self.out / "adapter", dirs_exist_ok=True)
        return Model(aligned.folder, folder / "adapter"), seconds

    def _load(self, folder: Path, quantize: str | None) -> PreTrainedModel:
        return load(folder, self.cfg.model.dtype, self.cfg.model.attention, quantize)

    def _attach(self, model: "Model", cfg: Any) -> PeftModel:
        """The model with the adapter to train: its own, which goes on, or a fresh one."""
        base = self._load(model.folder, self.cfg.model.quantize)
        named(base, self.cfg.model.attention_blocks, "model.attention_blocks")
        return attach_saved(base, model.adapter) if model.adapter else attach(base, cfg.lora, cfg.seed)

    def _steps(self, optim: Any, rows: int) -> int:
        """Optimizer steps: as many as asked for, or as the epochs over `rows` rows have."""
        if optim.steps is not None:
            return optim.steps
        return optim.epochs * -(-rows // (optim.batch_size * optim.accumulate * self.fabric.world_size))

    def _fit(
        self,
        stage: str,
        cfg: Any,
        net: PeftModel,
        seed: int,
        key: Metrics,
        rows: Sequence[Row],
        callbacks: list[Any],
        discard: bool,
    ) -> Checkpoint:
        """Train the adapter of `net`; `cfg` holds method and optim."""
        settings = _plain(cfg.optim)
        settings |= {"steps": self._steps(cfg.optim, len(rows))}
        del settings["epochs"]
        optim = Optim(**settings)
        method = instantiate(cfg.method)
        module = LisaModule(net, method, optim, seed, key)
        encoded = partial(encode, self.tokenizer, self.cfg.model.template, max_length=self.cfg.data.max_length)
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
        return checkpoint

    def _evaluate(self, stage: str, model: "Model") -> Metrics:
        """All held-out questions answered into responses.jsonl, and what the task's rule says of its own."""
        asked = questions(self.rows)
        key = self.origin | {"evaluated": model.name, "stage": stage} | self._asking(asked)
        path = self.out / "responses.jsonl"

        def make(folder: Path) -> None:
            started = perf_counter()
            quantize = self.cfg.model.quantize
            net: Any = self._load(model.folder, quantize)
            if model.adapter is not None:
                net = PeftModel.from_pretrained(net, model.adapter)
                net = merged(net) if quantize is None else net
            net.to(self.fabric.device)
            answers = self.evaluator.answers(net, asked, stage, digest(key), path)
            if self.fabric.is_global_zero:
                write_answers(folder / "responses.jsonl", answers)
                write_text(folder / "stage.json", json.dumps({"seconds": perf_counter() - started}))

        folder, seconds = self._stage("evaluate", key, make)
        answers = read_answers(folder / "responses.jsonl")
        self.answered += answers
        if self.fabric.is_global_zero:
            write_answers(path, self.answered)
            if not isinstance(self.task, Scored):
                outputs = alpaca_eval_outputs(answers, f"{self.cfg.model.name}-{stage}")
                write_text(self.out / f"alpaca_eval_{stage}.json", outputs)
        scores = {f"{stage}/{name}": value for name, value in task_scores(self.task, answers).items()}
        return scores | {"time/evaluate_s": seconds}

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
        """All that determines a model's answers, beside the model."""
        return {
            "questions": digest([asdict(q) for q in asked]),
            "limits": self.limits,
            "batch_size": self.cfg.evaluate.batch_size,
        }


@dataclass(frozen=True)
class Model:
    """A model's folder and the adapter on it, if there is one."""

    folder: Path
    adapter: Path | None

    @property
    def name(self) -> list[str]:
        """What it was made from: both lie in folders that are named by a hash of that."""
        return [self.folder.name, self.adapter.parent.name if self.adapter else ""]


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
    write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    write_text(out / "choices.json", json.dumps(choices, indent=2))
    samples = _page(out, metrics, tracker.curves.rows(), choices)
    tracker.summarize(metrics, samples)
    report.terminal(out, metrics, tracker.offline_folder, tracker.url)


def _page(out: Path, metrics: Metrics, curves: list[CurveRow], choices: dict[str, str]) -> list[dict[str, str]]:
    """Write report.html; the sample answers that it shows."""
    first = metrics.get("judges", [None])[0]
    judged = {(j.stage, j.kind, j.index): j for j in read_judged(out / "judged.jsonl") if j.judge == first}
    task = get_class(OmegaConf.load(out / "config.yaml").task._target_)()
    answers = [
        asdict(a) | {"verdict": verdict(task, a, judged.get((a.stage, a.kind, a.index)))}
        for a in read_answers(out / "responses.jsonl")
    ]
    report.page(out, metrics, curves, answers, choices, (out / "config.yaml").read_text(encoding="utf-8"))
    return report.samples(answers)


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
    without = {"report", "judges", "footprint.py"}  # what is shown, judged (with versions of its own) or estimated
    files = [f for f in sorted(package.rglob("*.py")) if not without & set(f.relative_to(package).parts)]
    return sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def _hush() -> None:
    """Keep libraries' greetings out of the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for known in ("`is_gradient_checkpointing` is deprecated", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=known)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
