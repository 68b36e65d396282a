"""Settings of the config sections that name no class: `SECTIONS` maps each section to its settings class."""

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from lisa_lightning.config.default_stages import STAGES, Stage
from lisa_lightning.config.expression import parse_expression
from lisa_lightning.config.fields import (
    MAX_BATCH,
    STRICT,
    BatchSize,
    Count,
    CountOrZero,
    Dtype,
    FilePath,
    HubId,
    Name,
    NonNegative,
    Percent,
    Phrase,
    Positive,
    PositiveShare,
    Seed,
    Share,
    ShareBelowOne,
    Size,
    Template,
    Words,
    Wrapper,
)
from lisa_lightning.config.optim import Optim

MAX_MINUTES: Final = 525_600
"""A year."""


def _check_targets(targets: str | list[str]) -> str | list[str]:
    if not targets or not all(targets):
        raise ValueError("empty")
    return targets


def _check_stages(stages: list[str]) -> list[str]:
    if not stages or len(set(stages)) < len(stages):
        raise ValueError("empty, or one of them twice")
    return stages


def _check_tasks(tasks: list[str]) -> list[str]:
    if not all(tasks) or any("/" in task for task in tasks) or len(set(tasks)) < len(tasks):
        raise ValueError("an empty name, a path, or one of them twice")
    return tasks


def _check_devices(devices: int | str | list[int]) -> int | str | list[int]:
    if isinstance(devices, list):
        allowed = len(devices) > 0 and all(0 <= device < MAX_BATCH for device in devices)
    elif isinstance(devices, str):
        allowed = devices == "auto"
    else:
        allowed = devices == -1 or 0 < devices < MAX_BATCH
    if not allowed:
        raise ValueError("not allowed")
    return devices


def _check_objective(objective: str) -> str:
    if objective not in OBJECTIVES:
        parse_expression(objective)
    return objective


OBJECTIVES: Final = ("defender", "attacker")
"""Objectives of a search with a name. Any other one is an expression of metrics."""
ObjectiveText = Annotated[
    str,
    AfterValidator(_check_objective),
    Words(
        "defender, attacker, or an expression of metrics such as 'final/accuracy - final/harmful_score': numbers, "
        "+ - * /, parentheses, min and max; a name with other signs is quoted"
    ),
]
ColumnNames = Annotated[list[Any], Field(min_length=1), Words("a list of column names")]
Mapping = Annotated[dict[Any, Any], Words("a mapping such as {field: column}")]
Targets = Annotated[str | list[str], AfterValidator(_check_targets), Words("all-linear or a list of module names")]
Devices = Annotated[
    int | str | list[int],
    AfterValidator(_check_devices),
    Words("a whole number above 0, a list of devices, -1 or auto for all"),
]
Stages = Annotated[list[Stage], AfterValidator(_check_stages), Words(f"a list of {', '.join(STAGES)}, each once")]
HarnessTasks = Annotated[
    list[str], AfterValidator(_check_tasks), Words("a list of names of tasks of lm-evaluation-harness, each once")
]
Variants = Annotated[dict[Any, Any], Words("a mapping such as {NAME: {prefill: Sure}}")]
FolderPath = Annotated[str, Field(min_length=1), Words("the path of a folder")]
Duration = Annotated[
    str,
    Field(pattern=r"^\d{2}:([01]\d|2[0-3]):[0-5]\d:[0-5]\d$"),
    Words("a duration DD:HH:MM:SS, as 00:08:00:00 for eight hours"),
]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
Project = Annotated[
    str,
    Field(pattern=r"^[^/\\#?%:]{1,128}$"),
    Words("a name of at most 128 characters, none of them / \\ # ? % :"),
]


@dataclass(frozen=True, config=STRICT)
class Data:
    """Section `data`: the user's data set."""

    n: Count = 1000
    """Rows of the user's data set, harmful ones included. The paper's value is 5000."""
    order: Literal["seeded", "head"] = "seeded"
    """`seeded` for a random sample, `head` for the first rows, counted as the official code does."""
    allow_overlap: bool = False
    """Keep rows whose prompt is held out, and the provider's rows whose prompt is a harmful row's."""
    strip: bool = True
    """Remove white space around texts, such as the blank after an SST-2 sentence. The official code keeps it."""
    during_alignment: Literal["keep", "discard"] = "keep"
    """User rows in alignment steps: `keep` them for later, or `discard` them as the official code does."""
    max_length: Count = 256
    """Tokens of a row; the rest is truncated. The official code has 2048."""
    tokenization: Literal["separate", "joined"] = "separate"
    """Prompt and answer are tokenized `separate`, or `joined` as one string as in the official code."""


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Sections `lora` and `align.lora`: the adapter that is trained."""

    r: Size = 8
    """Rank. The paper's value is 8."""
    alpha: Positive = 16
    """The update is scaled by alpha/r. The official code has 4."""
    dropout: ShareBelowOne = 0.0
    """Dropout of the inputs. The official code has 0.1."""
    targets: Targets = "all-linear"
    """`all-linear`, or the names of modules."""


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """Section `evaluate`: generation of answers, and evaluation during fine-tuning."""

    template: Template | None = None
    """Template of the held-out prompts; null for that of training, `model.template`."""
    system: Phrase | None = None
    """System prompt of the held-out prompts; null for none."""
    prefix: str | None = None
    """Text in front of the system prompt; null for the trigger of `method=backdoor_align`, else none; "" for none."""
    prefill: Phrase | None = None
    """First words of the answers to safety prompts, which the model continues; null for none."""
    wrapper: Wrapper | None = None
    """Text around each safety prompt, with {request} in its place, as in a jailbreak; null for none."""
    samples: Count = 1
    """Answers to each safety prompt; more than one needs a temperature above 0."""
    temperature: NonNegative = 0.0
    """Temperature of the answers to safety prompts; 0 for greedy ones."""
    top_p: PositiveShare = 1.0
    """Probability of the nucleus from which tokens are drawn; 1 for all tokens."""
    variants: Variants | None = None
    """Name -> options above that a further evaluation of each model changes; null for none."""
    max_new_tokens: Count = 24
    """Tokens of an answer to a safety prompt. The official code has 512."""
    batch_size: BatchSize = 48
    """Prompts generated together; also rows that a repair or a selection reads together."""
    every: CountOrZero = 50
    """Optimizer steps between two evaluations during fine-tuning; 0 for none."""
    curve_harmful: Count = 24
    """Harmful prompts of an evaluation during fine-tuning."""
    curve_harmless: Count = 12
    """Harmless prompts of an evaluation during fine-tuning, for over-refusal."""
    curve_rows: Count = 40
    """Task rows of an evaluation during fine-tuning."""
    gradient_rows: CountOrZero = 0
    """Rows of each stream whose losses and joint gradient are measured; 0 for none."""
    harmful_threshold: Percent = 50.0
    """Harmful score of an evaluation during fine-tuning above which the model counts as broken, in percent."""
    kl_rows: CountOrZero = 0
    """Harmful rows outside the user's on which the KL to the initial model is measured by token; 0 for none."""
    lm_eval: HarnessTasks = Field(default_factory=list)
    """Tasks of lm-evaluation-harness for general utility, with the extra `eval`; [] for none."""
    lm_eval_limit: Count | None = None
    """Rows of each of these tasks, of a group each of its tasks; null for all."""
    lm_eval_num_fewshot: CountOrZero | None = None
    """Examples in their prompts; null for each task's number. A task that sets 0 keeps it."""
    lm_eval_batch_size: BatchSize = 8
    """Requests that they send together. Some tasks have prompts of thousands of tokens."""
    lm_eval_folder: FolderPath | None = None
    """Folder of your own tasks as YAML files; null for none. Python that they name is run."""


@dataclass(frozen=True, config=STRICT)
class CheckpointSettings:
    """Section `checkpoint`."""

    every: Count = 20
    """Optimizer steps between two checkpoints."""


@dataclass(frozen=True, config=STRICT)
class Wandb:
    """Section `wandb`: where W&B files a run."""

    project: Project = "lisa_lightning"
    """Project of the run."""
    group: Name | None = None
    """Group of the run; by default the experiment's name, in a sweep that of its folder."""
    tags: Annotated[list[Tag], Words("a list of texts of 1 to 64 characters")] = Field(default_factory=list)
    """Tags in addition to defenses, task and model."""


@dataclass(frozen=True, config=STRICT)
class SweepSettings:
    """Section `sweep`: the objective of a search, such as `sweep=optuna` and `sweep=attack`."""

    value: ObjectiveText = "defender"
    """Value to maximize: `defender` for accuracy minus harmful score, `attacker`, or an expression of metrics."""
    retain: Share = 0.9
    """With `attacker`: share of the undefended accuracy that a model must keep to count."""
    undefended_accuracy: Percent | None = None
    """With `attacker`: accuracy of plain fine-tuning without harmful rows, in percent; null to measure it."""


@dataclass(frozen=True, config=STRICT)
class TinySizes:
    """Section `model.tiny`: sizes of a random model."""

    hidden_size: Size = 32
    """Width of the hidden states."""
    layers: Size = 2
    """Number of layers."""
    heads: Size = 4
    """Attention heads of a layer; twice as many must divide hidden_size."""


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """Section `model`: the base model and how it is used."""

    id: HubId | None = None
    """Hub id, or folder; null for a random model."""
    revision: Name | None = None
    """Commit of the hub; null for its main branch."""
    dtype: Dtype = "bfloat16"
    """Precision of the frozen weights; with 16-mixed take float16. Autocast copies other weights in every step."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in transformers."""
    align_targets: Targets = "all-linear"
    """Modules with LoRA at alignment."""
    finetune_targets: Targets = "all-linear"
    """Modules with LoRA at fine-tuning. The paper has q_proj and v_proj."""
    template: Template = "alpaca"
    """Template of the prompts."""
    adapters: Literal["stacked", "continued"] = "stacked"
    """`stacked`: the alignment adapter is merged and a fresh one trained; `continued`: it is trained further."""
    quantize: Literal["nf4"] | None = None
    """`nf4` for 4-bit weights, with the extra `quant` and an NVIDIA GPU."""
    tiny: Annotated[dict[str, object], Words("a mapping of its sizes")] | None = None
    """Sizes of a random model, for model=tiny only."""


@dataclass(frozen=True, config=STRICT)
class TrainerSettings:
    """Section `trainer`: arguments of Lightning's Trainer, and the patience of ranks."""

    accelerator: Name = "auto"
    """cpu, gpu, or what the machine has."""
    devices: Devices = 1
    """Devices of each node: a number, a list, or -1 or auto for all."""
    num_nodes: Count = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """`auto` for one process, `ddp` for several."""
    shard: bool = False
    """Shard the frozen weights of the model over all devices; adapters are whole on each."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the computation; `16-mixed` for a GPU without bfloat16, with a scaled loss."""
    max_time: Duration | None = None
    """Time after which a stage stops with a checkpoint; resume=true continues."""
    deterministic: Annotated[bool | Literal["warn"] | None, Words("true, false, warn or null")] = None
    """Use only deterministic algorithms, or warn about others."""
    benchmark: bool | None = None
    """Let cuDNN choose the fastest algorithms."""
    detect_anomaly: bool = False
    """Find the operation that made a NaN; slow."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Times of hooks and operations."""
    enable_progress_bar: bool = True
    """Show a progress bar."""
    enable_model_summary: bool = False
    """Print the modules of the model."""
    activation_checkpointing: bool = False
    """Compute the layers again in the backward pass: less memory, up to 1.6 times the time, the same result."""
    timeout_min: Annotated[float, Field(gt=0, le=MAX_MINUTES)] = 60
    """Minutes that ranks wait for one that sends no heartbeat."""


@dataclass(frozen=True, config=STRICT)
class TaskSettings:
    """Keys of section `task` that stages read. The class of the task is built separately."""

    max_new_tokens: Count
    """Tokens of an answer. The papers have 200."""


@dataclass(frozen=True, config=STRICT)
class RowSet:
    """Section `source.SET`: a set of rows, which is a file or a hub data set."""

    path: FilePath | None = None
    """Path of a file; null for a hub data set."""
    header: ColumnNames | None = None
    """Column names of a table without a header line."""
    columns: Mapping | None = None
    """Field -> column, or list of columns to try in order."""
    labels: Mapping | None = None
    """Field -> mapping of raw values to labels."""
    where: Mapping | None = None
    """Column -> value, or list of values, of the rows to read."""
    skip: CountOrZero = 0
    """Rows to leave out at the start."""
    take: Count | None = None
    """Rows to read; null for all."""
    hub: Annotated[str, Words("the id of a hub data set, or a folder in the hub's layout")] | None = None
    """Id of a hub data set, or a folder in the hub's layout."""
    config: Name | None = None
    """Configuration of the hub data set."""
    split: Name = "train"
    """Split of the hub data set."""
    revision: Name | None = None
    """Commit of the hub data set."""
    files: Name | None = None
    """Pattern of the files to read, instead of the split's."""
    rows: Count | None = None
    """Number of rows that the split must have."""


@dataclass(frozen=True, config=STRICT)
class AdapterTraining:
    """Training of an adapter: the keys of section `align` besides its method, and those of a reference adapter."""

    seed: Seed
    """Seed of the initial adapter, the order of the rows, and dropout."""
    lora: Lora
    optim: Optim


@dataclass(frozen=True, config=STRICT)
class FineTuning:
    """Training of the stage finetune."""

    seed: Seed
    """Seed of the initial adapter, the order of the rows, and dropout."""
    lora: Lora | None
    """The adapter; None trains all weights."""
    optim: Optim


@dataclass(frozen=True, config=STRICT)
class Reference:
    """Section `repair.reference`: the safe reference adapter of NLSR, and without `dpo` that of SafeMERGE."""

    sft: Optim
    """Optimizer of SFT on alignment rows."""
    dpo: Optim | None = None
    """Optimizer of DPO on refusals and harmful answers to the same requests; None for a reference of SFT alone."""
    extrapolation: NonNegative = 0.0
    """With `dpo` the reference is w_dpo + extrapolation * (w_dpo - w_sft). NLSR's official code has 0.9."""


@dataclass(frozen=True, config=STRICT)
class RunSettings:
    """All settings of a run but its classes: defenses, task, judges, callbacks and loggers."""

    seed: Seed
    """Seed of the user's rows, their order, the initial adapter and dropout; `align.seed` is separate."""
    harmful_ratio: Share
    """Share p of harmful rows among the user's n rows."""
    stages: Stages
    """Stages to run, in this order; by default all, or with `adapter` those after fine-tuning."""
    adapter: FolderPath | None
    """Folder of a LoRA adapter to repair and evaluate; null to train one."""
    aligned: HubId | None
    """Aligned model that the adapter belongs on, or the alignment adapter on `model.id`; null if it is `model.id`."""
    responses: FilePath | None
    """File of answers to judge, for stages=[judge]; null for those of the run in hydra.run.dir."""
    resume: bool
    """Continue the interrupted run in hydra.run.dir."""
    cache_dir: FolderPath
    """Folder of finished stages, verdicts and converted models. The variable LISA_CACHE changes the default."""
    data: Data
    model: ModelSettings
    lora: Lora | None
    """The adapter of fine-tuning; null trains all weights."""
    optim: Optim
    align: AdapterTraining
    reference: Reference | None
    """Settings of `repair.reference`; None for a repair without reference."""
    task: TaskSettings
    source: dict[str, RowSet]
    """Sets of rows. The key of a named prompt set is `SET.NAME`."""
    evaluate: Evaluate
    checkpoint: CheckpointSettings
    wandb: Wandb
    trainer: TrainerSettings

    @property
    def finetune(self) -> FineTuning:
        """The training of the stage finetune."""
        return FineTuning(self.seed, self.lora, self.optim)


OPTIMS: Final = ("optim", "align.optim", "repair.reference.sft.optim", "repair.reference.dpo.optim")
VARIANT_KEYS: Final = ("template", "system", "prefix", "prefill", "wrapper", "samples", "temperature", "top_p")
"""Keys of section `evaluate` that a variant may change."""
SETS: Final = ("train", "test", "alignment", "harmful", "defender", "harmful_prompts", "harmless_prompts")
SECTIONS: Final[dict[str, type]] = {
    "": RunSettings,
    "data": Data,
    **{f"source.{name}": RowSet for name in SETS},
    "lora": Lora,
    "align": AdapterTraining,
    "align.lora": Lora,
    **dict.fromkeys(OPTIMS, Optim),
    "repair.reference": Reference,
    "task": TaskSettings,
    "evaluate": Evaluate,
    "checkpoint": CheckpointSettings,
    "wandb": Wandb,
    "sweep": SweepSettings,
    "model": ModelSettings,
    "model.tiny": TinySizes,
    "trainer": TrainerSettings,
}
"""Config section -> its settings class; "" for the keys without a section."""
