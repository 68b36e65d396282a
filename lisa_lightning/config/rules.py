"""What each key of a config may be: for every rule, a test and the words that a refusal says."""

import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lisa_lightning.runtime.errors import UserError, printable

Check = tuple[Callable[[Any], bool], str]

STAGES = ("curate", "align", "finetune", "repair", "evaluate", "judge")


def _number(value: Any) -> bool:
    # A larger whole number fits into no tensor.
    return isinstance(value, float) or (_whole(value) and abs(value) < 2**63)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _two_shares(value: Any) -> bool:
    return isinstance(value, ListConfig) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


def _filled(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _open_address(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"https?://[^{PRIVATE}\s]+", value) is not None


def _targets(value: Any) -> bool:
    return _filled(value) or (isinstance(value, ListConfig) and len(value) > 0 and all(map(_filled, value)))


def _devices(value: Any) -> bool:
    if isinstance(value, ListConfig):
        return len(value) > 0 and all(_whole(device) and 0 <= device < MAX_ROWS for device in value)
    return value == "auto" or (_whole(value) and (0 < value < MAX_ROWS or value == -1))


def _stages(value: Any) -> bool:
    known = isinstance(value, ListConfig) and len(value) > 0 and all(stage in STAGES for stage in value)
    return known and len(set(value)) == len(value)


def _project(value: Any) -> bool:
    return _filled(value) and len(value) <= 128 and not set(value) & set("/\\#?%:")


def _tags(value: Any) -> bool:
    return isinstance(value, ListConfig) and all(_filled(tag) and len(tag) <= 64 for tag in value)


MAX_NUMBER = 1e30
"""Squares of larger numbers overflow float32."""
MAX_COUNT = 2**31 - 1
MAX_MINUTES = 525_600
"""A year."""
MAX_QUOTED = 120
"""Characters of a value in a message."""
MAX_ROWS = 2**16
"""Rows of a batch, tokens of an answer, requests under way: more would only exhaust memory."""
MAX_SIZE = 2**14
"""Width of a random model."""
POSITIVE: Check = (lambda v: _number(v) and 0 < v <= MAX_NUMBER, "a number above 0")
NOT_NEGATIVE: Check = (lambda v: _number(v) and 0 <= v <= MAX_NUMBER, "a number of at least 0")
SHARE: Check = (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1")
BETWEEN: Check = (lambda v: _number(v) and 0 < v < 1, "a number between 0 and 1")
DROPOUT: Check = (lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1")
COUNT: Check = (lambda v: _whole(v) and 0 < v <= MAX_COUNT, f"a whole number above 0, up to {MAX_COUNT}")
COUNT_OR_0: Check = (lambda v: _whole(v) and 0 <= v <= MAX_COUNT, f"a whole number of at least 0, up to {MAX_COUNT}")
BATCH: Check = (lambda v: _whole(v) and 0 < v <= MAX_ROWS, f"a whole number above 0, up to {MAX_ROWS}")
SIZE: Check = (lambda v: _whole(v) and 0 < v <= MAX_SIZE, f"a whole number above 0, up to {MAX_SIZE}")
SEED: Check = (lambda v: _whole(v) and 0 <= v < 2**63, "a whole number of at least 0, below 2^63")
SWITCH: Check = (lambda v: isinstance(v, bool), "true or false")


def _optional(check: Check) -> Check:
    return (lambda v: v is None or check[0](v), f"{check[1]}, or null")


def _one_of(*values: str) -> Check:
    return (lambda v: v in values, " or ".join(values))


OPTIM: dict[str, Check] = {
    "lr": POSITIVE,
    "steps": _optional(COUNT),
    "epochs": _optional(COUNT),
    "batch_size": BATCH,
    "accumulate": BATCH,
    "clip": _optional(POSITIVE),
    "schedule": _one_of("constant", "linear", "cosine"),
    "warmup_ratio": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "betas": (_two_shares, "a list of two numbers from 0 to below 1"),
    "eps": POSITIVE,
}
OPTIMS = ("optim", "align.optim", "repair.reference.sft.optim", "repair.reference.dpo.optim")
TARGETS: Check = (_targets, "all-linear or a list of module names")
LORA: dict[str, Check] = {"r": SIZE, "alpha": POSITIVE, "dropout": DROPOUT, "targets": TARGETS}
MAPPING: Check = (lambda v: isinstance(v, DictConfig), "a mapping such as {field: column}")
TEXT: Check = (_filled, "a name")
PHRASE: Check = (_filled, "a text")
SET: dict[str, Check] = {
    "path": _optional((lambda v: isinstance(v, str), "the path of a file")),
    "header": _optional((lambda v: isinstance(v, ListConfig) and len(v) > 0, "a list of column names")),
    "hub": _optional((lambda v: isinstance(v, str), "the id of a hub data set, or a folder in the hub's layout")),
    "config": _optional(TEXT),
    "split": TEXT,
    "revision": _optional(TEXT),
    "files": _optional(TEXT),
    "rows": _optional(COUNT),
    "columns": _optional(MAPPING),
    "labels": _optional(MAPPING),
    "where": _optional(MAPPING),
    "skip": COUNT_OR_0,
    "take": _optional(COUNT),
}
"""What a set of a source can be told: a file by its path, or a hub data set."""
LOCAL_SET = ("path", "header", "columns", "labels", "where", "skip", "take")
"""Keys that every set has; the others are those of a hub data set."""
SETS = ("train", "test", "alignment", "harmful", "defender", "harmful_prompts", "harmless_prompts")
METHOD: dict[str, Check] = {
    "rho": NOT_NEGATIVE,
    "alignment_steps": COUNT_OR_0,
    "user_steps": COUNT_OR_0,
    "proximal_after": SHARE,
    "safe_ratio": SHARE,
    "lamb": NOT_NEGATIVE,
    "alpha": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
    "seed": SEED,
    **dict.fromkeys(("safe_rows", "fisher_batch_size", "bias_length"), COUNT),
    **dict.fromkeys(("active_layers", "interval_steps", "probability_steps"), COUNT),
    **dict.fromkeys(("first_factor", "bias_factor"), NOT_NEGATIVE),
    **dict.fromkeys(("drop_threshold", "inner_clip"), _optional(POSITIVE)),
    **dict.fromkeys(("carry_over", "official", "padding", "per_micro_batch", "add_back"), SWITCH),
}
REPAIR: dict[str, Check] = {
    "mode": _one_of("number", "threshold"),
    "number": COUNT_OR_0,
    "threshold": (lambda v: _number(v) and -1 <= v <= 1, "a number from -1 to 1"),
    **dict.fromkeys(("dense_ratio", "prune_rate", "epsilon"), SHARE),
    "sparsity_ratio": BETWEEN,
    **dict.fromkeys(("random", "rounded", "pads_count", "most_similar_first"), SWITCH),
    "seed": SEED,
}
CURATE: dict[str, Check] = {
    "keep": (lambda v: _number(v) and 0 < v <= 1, "a number above 0, up to 1"),
    **dict.fromkeys(("upper_weight", "upper_decay"), SHARE),
    **dict.fromkeys(("epochs", "batch_size", "micro_batch"), COUNT),
    **dict.fromkeys(("lr", "selector_lr"), POSITIVE),
    "adam": SWITCH,
    "activation": _one_of("softmax", "sigmoid"),
    "seed": SEED,
}
PRIVATE = "@?#"
"""Signs in an address of a password, a query or a fragment, which messages, files and folders' names must not hold."""
ENDPOINT: dict[str, Check] = {
    "model": TEXT,
    "base_url": _optional(
        (_open_address, "http(s)://... without @, ? and #; an address with a password belongs into OPENAI_BASE_URL")
    ),
    "rubric": PHRASE,
    "usd_per_million_input": NOT_NEGATIVE,
    "usd_per_million_output": NOT_NEGATIVE,
    "max_cost_usd": POSITIVE,
    "max_output_tokens": COUNT,
    "concurrency": (lambda v: _whole(v) and 0 < v <= 1024, "a whole number above 0, up to 1024"),
    "retries": (lambda v: _whole(v) and 0 <= v <= 100, "a whole number of at least 0, up to 100"),
    "timeout_s": (lambda v: _number(v) and 0 < v <= 86400, "a number above 0, up to 86400"),
    "temperature": _optional((lambda v: _number(v) and 0 <= v <= 2, "a number from 0 to 2")),
}
ID: Check = (_filled, "a hub id or a folder")
WORDS: Check = (lambda v: isinstance(v, str), "a text")
DTYPE = _one_of("float32", "bfloat16", "float16")
JUDGES: dict[str, dict[str, Check]] = {
    "moderation": {
        "id": ID,
        "revision": _optional(TEXT),
        "dtype": DTYPE,
        "text": PHRASE,
        "max_length": COUNT,
        "threshold": BETWEEN,
        "harmful_labels": _optional((lambda v: isinstance(v, ListConfig) and len(v) > 0, "a list of labels")),
        "batch_size": COUNT,
    },
    "llama_guard": {
        "id": ID,
        "revision": _optional(TEXT),
        "dtype": DTYPE,
        "before": WORDS,
        "safe": TEXT,
        "unsafe": TEXT,
        "max_length": COUNT,
    },
    "openai": ENDPOINT | {"flag_from": (lambda v: _whole(v) and 2 <= v <= 5, "2, 3, 4 or 5")},
    "win_rate": ENDPOINT,
    "linear": {
        "rows": (lambda v: isinstance(v, DictConfig), "a mapping with path and more"),
        "rows.path": (lambda v: isinstance(v, str), "the path of a file"),
        **{f"rows.{key}": SET[key] for key in ("header", "columns", "labels", "where", "skip", "take")},
    },
}
RULES: dict[str, Check] = {
    "seed": SEED,
    "harmful_ratio": SHARE,
    "stages": (_stages, f"a list of {', '.join(STAGES)}, each once"),
    "resume": SWITCH,
    "cache_dir": (lambda v: isinstance(v, str) and v != "", "the path of a folder"),
    "wandb.project": (_project, "a name of at most 128 characters, none of them / \\ # ? % :"),
    "wandb.group": _optional(TEXT),
    "wandb.tags": (_tags, "a list of texts of 1 to 64 characters"),
    "data.n": COUNT,
    "data.order": _one_of("seeded", "head"),
    "data.allow_overlap": SWITCH,
    "data.during_alignment": _one_of("keep", "discard"),
    "data.max_length": COUNT,
    "evaluate.max_new_tokens": COUNT,
    "evaluate.batch_size": BATCH,
    "evaluate.every": COUNT_OR_0,
    "evaluate.curve_harmful": COUNT,
    "evaluate.curve_harmless": COUNT,
    "evaluate.curve_rows": COUNT,
    "evaluate.gradient_rows": COUNT_OR_0,
    "checkpoint.every": COUNT,
    "align.seed": SEED,
    **{f"{where}.{key}": rule for where in OPTIMS for key, rule in OPTIM.items()},
    **{f"{where}.{key}": rule for where in ("lora", "align.lora") for key, rule in LORA.items()},
    **{f"{where}.{key}": rule for where in ("method", "align.method") for key, rule in METHOD.items()},
    **{f"curate.{key}": rule for key, rule in CURATE.items()},
    **{f"repair.{key}": rule for key, rule in REPAIR.items()},
    "repair.reference.extrapolation": NOT_NEGATIVE,
    "repair.reference.dpo.method.beta": POSITIVE,
    "model.id": _optional(ID),
    "model.revision": _optional(TEXT),
    "model.tiny": _optional((lambda v: isinstance(v, DictConfig), "a mapping of its sizes")),
    **{f"model.tiny.{key}": SIZE for key in ("hidden_size", "layers", "heads")},
    **{f"model.{stage}_targets": TARGETS for stage in ("align", "finetune")},
    "model.dtype": DTYPE,
    "trainer.accelerator": TEXT,
    "trainer.devices": (_devices, "a whole number above 0, a list of devices, -1 or auto for all"),
    "trainer.num_nodes": COUNT,
    "trainer.strategy": _one_of("auto", "ddp"),
    "trainer.precision": _one_of("32-true", "bf16-mixed"),
    "trainer.timeout_min": (lambda v: _number(v) and 0 < v <= MAX_MINUTES, f"a number above 0, up to {MAX_MINUTES}"),
    "model.attention": _one_of("sdpa", "eager", "flash_attention_2"),
    "model.template": _one_of("alpaca", "alpaca_newline", "chat"),
    "model.adapters": _one_of("stacked", "continued"),
    "model.quantize": _optional(_one_of("nf4")),
    "task.max_new_tokens": COUNT,
    **{f"judge.{name}.{key}": rule for name, rules in JUDGES.items() for key, rule in rules.items()},
    "responses": _optional((lambda v: isinstance(v, str), "the path of a file")),
    **{f"source.{name}": (lambda v: isinstance(v, DictConfig), "a mapping with path and more") for name in SETS},
    **{f"source.{name}.{key}": rule for name in SETS for key, rule in SET.items()},
}
INSTEAD = {
    "accumulate_grad_batches": "optim.accumulate",
    "gradient_clip_val": "optim.clip",
    "gradient_clip_algorithm": "optim.clip",
    "max_steps": "optim.steps",
    "max_epochs": "optim.epochs",
    "val_check_interval": "evaluate.every",
    "enable_checkpointing": "checkpoint.every",
    "logger": "wandb",
}
"""What the training loop does itself, by manual optimization -> the key that says how."""
TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "precision", "timeout_min")


def not_allowed(key: str, value: Any, allowed: str) -> UserError:
    """Return the error for a wrong value of a key."""
    return UserError(f"{key}={quoted(value)} is not allowed; it must be {allowed}")


def quoted(value: Any) -> str:
    """Return a value as a message quotes it: short, and without what may be a secret of an address.

    That is its password, its query and its fragment.
    """
    text = str(OmegaConf.to_container(value)) if isinstance(value, ListConfig | DictConfig) else str(value)
    text = re.sub(r"(\w+://)\S*(?=@)|\S*:\S*(?=@)", r"\1...", text)
    text = re.sub(r"(?<=[?#])\S+", "...", text) if "://" in text else text
    text = printable(text)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."
