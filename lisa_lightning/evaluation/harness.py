"""General utility by tasks of lm-evaluation-harness, which is imported only here. Start at `load_harness`."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast, final

from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from lisa_lightning.config.settings import Evaluate
from lisa_lightning.data.templates import with_fixed_date
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.runtime.errors import UserError, first_line, printable

KEY: Final = "evaluate.lm_eval"
AUTOCAST: Final = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
"""`trainer.precision` -> data type of autocast; other precisions have none."""


@final
@dataclass(frozen=True)
class Harness:
    """The tasks of a run, which were found before training."""

    tasks: Sequence[str]
    """Names of tasks, groups or tags."""
    limit: int | None
    """Rows of each task; None for all."""
    num_fewshot: int | None
    """Examples in a prompt; None for the task's number."""
    batch_size: int
    """Requests in a batch."""
    files: dict[str, str]
    """Task -> hash of the local files that define it; "" for a task of the harness."""
    manager: Any
    """The `TaskManager` of the harness."""

    def key(self, task: str) -> dict[str, Any]:
        """Return the inputs other than the model and the prompts that determine a result, for a cache key."""
        return {
            "task": task,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "batch_size": self.batch_size,
            "files": self.files[task],
            "harness": version("lm-eval"),
        }

    def evaluate(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompting: Prompting, precision: str, task: str
    ) -> dict[str, dict[str, Any]]:
        """Return the results of a task, of a group and its tasks, or of all tasks with a tag, by name.

        The random state is restored. Prompts are those of the harness: in the chat template if the evaluation has
        it, and after the system prompt.

        Args:
            model: a causal language model on its device.
            tokenizer: its tokenizer, whose padding and date of the chat template are changed.
            prompting: template and system prompt of the evaluation.
            precision: `trainer.precision`.
            task: one of `tasks`.
        """
        simple_evaluate = import_module("lm_eval.evaluator").simple_evaluate
        hflm = import_module("lm_eval.models.huggingface").HFLM
        model.eval()
        if tokenizer.chat_template is not None:
            tokenizer.chat_template = with_fixed_date(tokenizer.get_chat_template())
        with guarded(), isolate_rng():
            wrapped = hflm(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=self.batch_size,
                mixed_precision_dtype=AUTOCAST.get(precision),
                trust_remote_code=False,
                enable_thinking=False,
            )
            results: Any = simple_evaluate(
                wrapped,
                tasks=[task],
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                task_manager=self.manager,
                system_instruction=_system_instruction(prompting),
                apply_chat_template=prompting.template == "chat",
                log_samples=False,
                confirm_run_unsafe_code=False,
            )
        return results["results"]


def _system_instruction(prompting: Prompting) -> str | None:
    """Return the system prompt of every request, None without one. An empty line ends it outside a chat template."""
    end = "" if prompting.template == "chat" else "\n\n"
    return f"{prompting.system_prompt}{end}" if prompting.system_prompt else None


def load_harness(settings: Evaluate) -> Harness | None:
    """Return the tasks that the settings name, None without any. Their data are loaded once, but no model.

    Raises:
        UserError: if the harness is not installed, or a task is unknown, can't be loaded or runs a model's code.
    """
    if not settings.lm_eval:
        return None
    if find_spec("lm_eval") is None:
        raise UserError(
            f"{KEY}={_listed(settings.lm_eval)}: it needs lm-evaluation-harness. "
            "Fix: pip install 'lisa-lightning[eval]', or leave the key out"
        )
    if settings.lm_eval_folder is not None and not Path(settings.lm_eval_folder).is_dir():
        raise UserError(
            f"{KEY}_folder={settings.lm_eval_folder}: there is no such folder. "
            "Fix: name the folder with the YAML files of the tasks"
        )
    with guarded():
        manager = _task_manager(settings.lm_eval, settings.lm_eval_folder)
        files = {task: _load_files(manager, task, settings) for task in settings.lm_eval}
    return Harness(
        settings.lm_eval,
        settings.lm_eval_limit,
        settings.lm_eval_num_fewshot,
        settings.lm_eval_batch_size,
        files,
        manager,
    )


def _task_manager(tasks: Sequence[str], folder: str | None) -> Any:
    """Return the tasks of the folder, and those of the harness unless the folder has all that are named."""
    task_manager = import_module("lm_eval.tasks").TaskManager
    if folder is not None:
        local = task_manager(include_path=folder, include_defaults=False)
        # A group or a tag may have members in the harness, whose 14,000 files take seconds to read.
        if all(task in local.task_index and local.task_index[task].kind.name == "TASK" for task in tasks):
            return local
    return task_manager(include_path=folder)


def _load_files(manager: Any, task: str, settings: Evaluate) -> str:
    """Load a task, and return the hash of the local files that define it."""
    if task not in manager.all_tasks:
        raise UserError(_unknown(manager, task, settings.lm_eval_folder))
    try:
        members = list(manager.load([task])["tasks"].values())
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(
            f"{KEY}=[{printable(task)}]: the task can't be loaded ({kind}{printable(first_line(error))}). "
            "Fix: make its data and packages available, or leave it out"
        ) from error
    for member in members:
        if reason := _refusal(member):
            raise UserError(f"{KEY}=[{printable(task)}]: {reason}. Fix: leave it out")
    paths = [Path(settings.lm_eval_folder)] if settings.lm_eval_folder else []
    paths += [path for member in members for path in _data_paths(member.config)]
    return _files_hash(paths) if paths else ""


def _unknown(manager: Any, task: str, folder: str | None) -> str:
    """Return the error message for an unknown task."""
    similar = get_close_matches(task, manager.all_tasks, n=3, cutoff=0.6)
    fix = f"did you mean {' or '.join(similar)}?" if similar else "choose a name"
    more = "" if folder is None else f" and no readable one in {KEY}_folder={folder}"
    return (
        f"{KEY}=[{printable(task)}]: it is no task of lm-evaluation-harness {version('lm-eval')}{more}. "
        f"Fix: {fix} `lm-eval ls tasks` lists all"
    )


def _refusal(task: Any) -> str | None:
    """Return the reason for which a task can't be used, None if it can."""
    if getattr(task, "UNSAFE_CODE", False):
        return "it runs code that the model writes, which no run does"
    if getattr(task, "MULTIMODAL", False):
        return "it needs a model that reads images or sounds"
    missing = [name for name, metric in getattr(task, "_metric_fn_list", {}).items() if metric is None]
    return f"its metric {missing[0]} is code of the hub, which no run loads" if missing else None


def _data_paths(config: Any) -> Iterator[Path]:
    """Yield the local files and folders that a task reads its rows from."""
    options = getattr(config, "dataset_kwargs", None) or {}
    files = options.get("data_files") or []
    for value in (getattr(config, "dataset_path", None), options.get("data_dir"), *_strings(files)):
        if isinstance(value, str):
            yield from map(Path, sorted(glob(value, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute one


def _strings(tree: Any) -> Iterator[str]:
    """Yield the texts in nested mappings and lists."""
    if isinstance(tree, str):
        yield tree
    else:
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def _files_hash(paths: Sequence[Path]) -> str:
    """Return a hash of names and contents of files, and of all files in folders."""
    digest = sha256()
    for path in paths:
        files = sorted(f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        for file in files if path.is_dir() else [path]:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{name}\n{sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _listed(tasks: Sequence[str]) -> str:
    return printable(f"[{','.join(tasks)}]")


@contextmanager
def guarded() -> Iterator[None]:
    """Hide messages of the harness, whose errors are raised, and refuse metrics that are code of the hub."""
    logger, metrics = logging.getLogger("lm_eval"), cast(Any, import_module("evaluate"))
    level, load = logger.level, metrics.load
    logger.setLevel(logging.CRITICAL)
    metrics.load = _refuse_hub_code
    try:
        yield
    finally:
        logger.setLevel(level)
        metrics.load = load


def _refuse_hub_code(name: str, *_: Any, **__: Any) -> Any:
    """Replace `evaluate.load`, which runs Python from the hub or from the current folder."""
    raise UserError(f"its metric {name} is code of the hub, which no run loads")
