"""The stages that a model goes through, each kept in the cache under a hash of all that determines it."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lisa_lightning.alignment_delta import Delta, low_rank_deltas
from lisa_lightning.cache import build, cache_folder, code_digest, digest, explained, read_json, write_text
from lisa_lightning.curate.curate import Candidates, Curate
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.interleave import Examples, StepBatches
from lisa_lightning.data.packing import Example, Pack, Packing, pad
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.errors import UserError
from lisa_lightning.evaluate.alpaca_eval import alpaca_eval_outputs
from lisa_lightning.evaluate.evaluator import Answer, Evaluator, Question, questions, read_answers, write_answers
from lisa_lightning.evaluate.scores import task_scores
from lisa_lightning.judges.embedded import EmbeddedJudge
from lisa_lightning.loss import choose_packing
from lisa_lightning.module import LisaModule, Optim
from lisa_lightning.net import (
    attach,
    attach_saved,
    load,
    load_tokenizer,
    merged,
    named,
    save_adapter,
    save_merged,
    trainable,
)
from lisa_lightning.passes import Passes
from lisa_lightning.repair.repair import Given, Repair, write
from lisa_lightning.schedule import Stream
from lisa_lightning.tasks.task import Scored
from lisa_lightning.tracking import Tracker, read_rows
from lisa_lightning.training import Checkpoint, EvaluateCurve, JointGradient, Record, fit

Metrics = dict[str, Any]


class Stages:
    """align -> finetune -> repair -> evaluate on one set of ranks; what the cache holds is not run again."""

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
            "code": code_digest(),
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
        metrics: Metrics = {
            "seed": cfg.seed,
            "code": self.origin["code"],
            "threads": torch.get_num_threads(),
            "rows/overlap": sum(self.rows.overlap.values()),
        }
        metrics |= {f"rows/overlap/{pair}": count for pair, count in self.rows.overlap.items()}
        model = Model(self.base, None)
        if "align" in cfg.stages and cfg.align.method is not None:
            rows = self.rows.alignment
            if "curate" in cfg.stages and cfg.curate:
                rows, metrics["time/curate_s"] = self._curate(rows)
                metrics["rows/curated"] = len(rows)
            model, cost = self._align(rows)
            metrics |= _named("align", cost)
        if "evaluate" in cfg.stages:
            metrics |= self._evaluate("aligned", model)
        if "finetune" in cfg.stages:
            aligned = model
            model, cost = self._finetune(aligned)
            metrics |= _named("finetune", cost)
            metrics["train/steps"] = self._steps(cfg.optim, len(self.user))
            if "repair" in cfg.stages and cfg.repair:
                model, metrics["time/repair_s"] = self._repair(aligned, model)
            if self.fabric.is_global_zero and model.adapter is not None:
                with explained(self.out):
                    shutil.copytree(model.adapter, self.out / "adapter", dirs_exist_ok=True)
            if "evaluate" in cfg.stages:
                seconds = metrics["time/evaluate_s"]
                metrics |= self._evaluate("final", model)
                metrics["time/evaluate_s"] += seconds
        return metrics

    def _curate(self, rows: list[Row]) -> tuple[list[Row], float]:
        """The alignment rows that are worth aligning on."""
        key = self.origin | {
            "curate": plain(self.cfg.curate),
            "lora": plain(self.cfg.align.lora),
            "seed": self.cfg.align.seed,
            "max_length": self.cfg.data.max_length,
            "rows": _rows_digest(rows),
            "defender_rows": _rows_digest(self.rows.defender),
        }

        def trainee() -> tuple[Passes, Packing]:
            net = self._attach(Model(self.base, None), self.cfg.align).to(self.fabric.device)
            packing = choose_packing(net.get_base_model(), self.cfg.data.max_length)
            return Passes(net, lambda stream, size: iter(())), packing

        def make(folder: Path) -> None:
            started = perf_counter()
            curate: Curate = instantiate(self.cfg.curate)
            own, harmful = (Examples(r, self._encode) for r in (rows, self.rows.defender))
            with self.fabric.autocast():
                curated = curate.curate(Candidates(own, harmful, trainee))
            if self.fabric.is_global_zero:
                write_text(folder / "rows.json", json.dumps(asdict(curated)))
                write_text(folder / "stage.json", json.dumps({"seconds": perf_counter() - started}))

        folder, cost = self._stage("curate", key, make)
        return [rows[i] for i in read_json(folder / "rows.json")["kept"]], cost["seconds"]

    def _align(self, own: list[Row]) -> tuple["Model", Metrics]:
        """The aligned model: LoRA on these rows, merged into the base or kept beside it to go on with."""
        cfg = self.cfg.align
        key = self.origin | {
            "align": plain(cfg),
            "rows": _rows_digest(own),
            "defender_rows": _rows_digest(self.rows.defender),
            "max_length": self.cfg.data.max_length,
        }

        def make(folder: Path) -> None:
            net = self._attach(Model(self.base, None), cfg)
            rows: dict[Stream, Sequence[Row]] = {
                "user": [],
                "alignment": own,
                "harmful": self.rows.defender,
            }
            checkpoint = self._fit("align", cfg, net, cfg.seed, key, rows, len(own), [], False, dict)
            if self.fabric.is_global_zero:
                save_adapter(net, str(self.base), folder / "adapter")
                if self.cfg.model.adapters == "stacked":
                    if self.cfg.model.quantize is not None:  # 4-bit weights can't take the adapter in
                        net = attach_saved(self._load(self.base, None), folder / "adapter")
                    save_merged(net, self.tokenizer, folder)
                self._record("align", folder, checkpoint)

        folder, cost = self._stage("align", key, make)
        stacked = self.cfg.model.adapters == "stacked"
        return Model(folder, None) if stacked else Model(self.base, folder / "adapter"), cost

    def _finetune(self, aligned: "Model") -> tuple["Model", Metrics]:
        """The user's fine-tuning under the chosen method: a folder with the adapter."""
        cfg = self.cfg
        key = self.origin | {
            "aligned": aligned.name,
            "method": plain(cfg.method),
            "lora": plain(cfg.lora),
            "optim": plain(cfg.optim),
            "seed": cfg.seed,
            "during_alignment": cfg.data.during_alignment,
            "max_length": cfg.data.max_length,
            "user_rows": _rows_digest(self.user),
            "alignment_rows": _rows_digest(self.rows.alignment),
            "curve": None,
        }
        callbacks: list[Any] = []
        if cfg.evaluate.every:
            asked = questions(
                self.rows, cfg.evaluate.curve_prompts, cfg.evaluate.curve_harmless, cfg.evaluate.curve_rows
            )
            judge = EmbeddedJudge()
            callbacks.append(EvaluateCurve(self.evaluator, judge, self.task, asked, cfg.evaluate.every))
            key["curve"] = self._asking(asked) | {"every": cfg.evaluate.every, "judge": judge.version}
            if cfg.evaluate.gradient_rows:
                callbacks.append(JointGradient(cfg.evaluate.gradient_rows, cfg.evaluate.every))
                key["curve"] |= {"gradient_rows": cfg.evaluate.gradient_rows}

        def make(folder: Path) -> None:
            discard = cfg.data.during_alignment == "discard"
            net = self._attach(aligned, cfg)
            rows: dict[Stream, Sequence[Row]] = {"alignment": self.rows.alignment, "user": self.user}
            deltas = partial(self._deltas, aligned)
            checkpoint = self._fit(
                "finetune", cfg, net, cfg.seed, key, rows, len(self.user), callbacks, discard, deltas
            )
            if self.fabric.is_global_zero:
                save_adapter(net, str(aligned.folder), folder / "adapter")
                self._record("finetune", folder, checkpoint)

        folder, cost = self._stage("finetune", key, make)
        return Model(aligned.folder, folder / "adapter"), cost

    def _repair(self, aligned: "Model", tuned: "Model") -> tuple["Model", float]:
        """The finished adapter repaired, by the first rank alone."""
        assert tuned.adapter is not None
        adapter = tuned.adapter
        key = self.origin | {
            "tuned": tuned.name,
            "repair": plain(self.cfg.repair),
            "max_length": self.cfg.data.max_length,
            "defender_rows": _rows_digest(self.rows.defender),
            "alignment_rows": _rows_digest(self.rows.alignment),
        }

        reference = self._reference(aligned) if "reference" in self.cfg.repair else None

        def make(folder: Path) -> None:
            if not self.fabric.is_global_zero:
                return
            started = perf_counter()
            net = attach_saved(self._load(tuned.folder, None), adapter).to(self.fabric.device)
            rows = {"harmful": self.rows.defender, "alignment": self.rows.alignment}
            factors = {name: w.detach() for name, w in trainable(net).items()}
            own = {name: value for name, value in plain(self.cfg.repair).items() if name != "reference"}
            repair: Repair = instantiate(own)
            repaired = repair.repair(
                Given(
                    factors,
                    net=lambda: net,
                    rows=lambda stream: self._padded(rows[stream]),
                    deltas=lambda: self._deltas(aligned),
                    reference=lambda: load_file(reference / "reference.safetensors") if reference else {},
                )
            )
            write(trainable(net), repaired.factors)
            save_adapter(net, str(tuned.folder), folder / "adapter")
            write_text(folder / "stage.json", json.dumps({"seconds": perf_counter() - started}))

        folder, cost = self._stage("repair", key, make)
        return Model(tuned.folder, folder / "adapter"), cost["seconds"]

    def _reference(self, aligned: "Model") -> Path:
        """The folder of a safe adapter, extrapolated from plain fine-tuning on alignment rows through DPO."""
        cfg = self.cfg.repair.reference
        pairs = self._pairs()
        key = self.origin | {
            "aligned": aligned.name,
            "reference": plain(cfg),
            "lora": plain(self.cfg.lora),
            "seed": self.cfg.align.seed,
            "max_length": self.cfg.data.max_length,
            "alignment_rows": _rows_digest(self.rows.alignment),
            "defender_rows": _rows_digest(self.rows.defender),
        }

        def make(folder: Path) -> None:
            seed = self.cfg.align.seed
            net = attach(self._load(aligned.folder, None), self.cfg.lora, seed)
            safe: dict[Stream, Sequence[Row]] = {"alignment": self.rows.alignment}
            cost = self._fit(
                "reference_sft", cfg.sft, net, seed, key, safe, len(self.rows.alignment), [], False, dict
            ).cost
            before = {name: w.detach().clone() for name, w in trainable(net).items()}
            paired: dict[Stream, Sequence[Row]] = {"alignment": pairs[0], "harmful": pairs[1]}
            more = self._fit("reference_dpo", cfg.dpo, net, seed, key, paired, len(pairs[0]), [], False, dict).cost
            if self.fabric.is_global_zero:
                further = {n: w.detach().lerp(before[n], -cfg.extrapolation).cpu() for n, w in trainable(net).items()}
                save_file(further, folder / "reference.safetensors")
                write_text(folder / "stage.json", json.dumps({"seconds": cost["seconds"] + more["seconds"]}))

        return self._stage("reference", key, make)[0]

    def _pairs(self) -> tuple[list[Row], list[Row]]:
        """Refusals and harmful answers to the same requests.

        Raises:
            UserError: there are none.
        """
        refusals = {(row.instruction, row.context): row for row in self.rows.alignment}
        both = [(refusals[q], r) for r in self.rows.defender if (q := (r.instruction, r.context)) in refusals]
        if not both:
            raise UserError(
                "repair=nlsr prefers refusals to harmful answers to the same requests, and no prompt of "
                "source.defender is one of source.alignment's"
            )
        preferred, others = zip(*both, strict=True)
        return list(preferred), list(others)

    def _padded(self, rows: Sequence[Row]) -> Iterator[Pack]:
        """Rows as padded packs, as many together as are evaluated together."""
        size = self.cfg.evaluate.batch_size
        for start in range(0, len(rows), size):
            yield from pad(self._encode(row) for row in rows[start : start + size])

    def _encode(self, row: Row) -> Example:
        return encode(self.tokenizer, self.cfg.model.template, row, max_length=self.cfg.data.max_length)

    def _deltas(self, aligned: "Model") -> dict[str, Delta]:
        """What aligning changed.

        Raises:
            UserError: there was no aligning, or its adapter goes on being trained.
        """
        if aligned.folder == self.base:
            raise UserError(
                "What aligning changed can't be told: the stage align did not run (stages, align=none), or its adapter "
                "went on into fine-tuning (model.adapters=continued)"
            )
        return low_rank_deltas(aligned.folder / "adapter")

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
        rows: Mapping[Stream, Sequence[Row]],
        epoch: int,
        callbacks: list[Any],
        discard: bool,
        deltas: Callable[[], Mapping[str, Delta]],
    ) -> Checkpoint:
        """Train the adapter of `net`; `cfg` holds method and optim, `epoch` is the rows that one has."""
        settings = plain(cfg.optim)
        settings |= {"steps": self._steps(cfg.optim, epoch)}
        del settings["epochs"]
        optim = Optim(**settings)
        method = instantiate(cfg.method)
        streams: dict[Stream, Examples] = {name: Examples(own, self._encode) for name, own in rows.items()}
        packing = pad if method.rows_apart else choose_packing(net.get_base_model(), self.cfg.data.max_length)
        steps = StepBatches(
            streams,
            packing,
            method,
            optim.steps,
            optim.batch_size,
            optim.accumulate,
            seed,
            discard=discard,
            paired=method.paired,
        )
        module = LisaModule(Passes(net, steps.whole, deltas), method, optim, seed, key)
        checkpoint = Checkpoint(self.out / "checkpoints" / f"{stage}.ckpt", self.cfg.checkpoint.every, optim.steps)
        record = Record(self.tracker if stage in ("align", "finetune") else None, stage)
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

        folder, cost = self._stage("evaluate", key, make)
        answers = read_answers(folder / "responses.jsonl")
        self.answered += answers
        if self.fabric.is_global_zero:
            done = {answer.stage for answer in self.answered}
            begun = [answer for answer in read_answers(path) if answer.stage not in done]  # by a run that was killed
            write_answers(path, [*self.answered, *begun])
            if not isinstance(self.task, Scored):
                outputs = alpaca_eval_outputs(answers, f"{self.cfg.model.name}-{stage}")
                write_text(self.out / f"alpaca_eval_{stage}.json", outputs)
        scores = {f"{stage}/{name}": value for name, value in task_scores(self.task, answers).items()}
        return scores | {"time/evaluate_s": cost["seconds"]}

    def _stage(self, name: str, key: Metrics, make: Any) -> tuple[Path, Metrics]:
        """The finished folder of a stage, and what it cost when it ran."""
        built = False

        def building(folder: Path) -> None:
            nonlocal built
            built = True
            make(folder)

        folder = build(self.fabric, self.cache / name, key, building)
        if not built and self.tracker is not None and (folder / "curves.csv").exists():
            self.tracker.take_over(read_rows(folder / "curves.csv"))
        return folder, read_json(folder / "stage.json")

    def _record(self, stage: str, folder: Path, checkpoint: Checkpoint) -> None:
        """Keep a training stage's curves and cost with its result."""
        assert self.tracker is not None
        self.tracker.curves.export(stage, folder / "curves.csv")
        write_text(folder / "stage.json", json.dumps(checkpoint.cost))

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


def _named(stage: str, cost: Metrics) -> Metrics:
    """The cost of a training stage as metrics."""
    return {f"time/{stage}_s": cost["seconds"], f"memory/{stage}_mib": cost["peak_mib"]}


def plain(cfg: Any) -> dict[str, Any]:
    """A part of the config as a dictionary, everything in it resolved."""
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def _rows_digest(rows: Sequence[Row]) -> str:
    found = sha256()
    for row in rows:  # one at a time: there may be millions
        found.update(json.dumps(astuple(row)).encode() + b"\n")
    return found.hexdigest()[:16]
