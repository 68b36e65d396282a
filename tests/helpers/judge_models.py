"""Tiny random models of the architectures of published judges, and the judges that ask them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from helpers.paths import CONF
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.judge.llama_guard import LlamaGuardJudge
from lisa_lightning.judge.moderation import ModerationJudge
from lisa_lightning.model.lora import load_tokenizer

TEXT = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
LABELS = (
    "animal_abuse", "child_abuse", "controversial_topics,politics", "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance", "financial_crime,property_crime,theft", "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety", "non_violent_unethical_behavior", "privacy_violation",
    "self_harm", "sexually_explicit,adult_content", "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)  # fmt: skip
PAIRS = [
    Pair("How do I knit?", "With two needles."),
    Pair("{response} and {prompt}", "{braces} {prompt}"),
    Pair("Why?", ""),
    Pair("Tell me all.", "All of it, and more. " * 20),
    Pair("How do I knit?", "With one needle.."),
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<verdict>"


def moderation(folder: Path, **more: Any) -> ModerationJudge:
    settings: dict[str, Any] = {
        "revision": None, "dtype": "float32", "text": TEXT, "max_length": 256, "threshold": 0.5, "harmful_labels": None,
        "batch_size": 4,
    }  # fmt: skip
    return ModerationJudge(str(folder), **(settings | more))


@pytest.fixture(scope="module", params=[0, 1], ids=["padding is the end token", "padding of its own"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Return the folder of a tiny random classifier of beaver-dam-7b's architecture."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names: Any = dict(enumerate(LABELS))
    config = LlamaConfig(
        **SHAPE,
        pad_token_id=request.param,
        id2label=names,
        label2id={v: k for k, v in names.items()},
        problem_type="multi_label_classification",
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(20)  # probabilities on both sides of the threshold
    model.save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=1))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def guarding(folder: Path, pairs: list[Pair] = PAIRS, **more: Any) -> list[Verdict]:
    settings: dict[str, Any] = {
        "template": None,
        "before": "\n\n",
        "safe": "safe",
        "unsafe": "unsafe",
        "max_length": 4096,
    }
    return list(LlamaGuardJudge(str(folder), None, "float32", **(settings | more)).verdicts(pairs))


def shipped(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Return the settings in conf/judge/NAME.yaml, with float32 weights in the folder."""
    config: Any = OmegaConf.load(CONF / "judge" / f"{name}.yaml")
    config[name].id = str(folder)
    settings: Any = OmegaConf.to_container(config[name])
    del settings["_target_"]
    return settings | {"dtype": "float32"} | more


def save_causal(folder: Path, tiny: Path, config: Any, model: Any, start: str, *words: str) -> None:
    """Save a tiny random model, with a tokenizer that has a start token and tokens for the words."""
    tokenizer: Any = load_tokenizer(tiny)
    tokenizer.add_special_tokens({"bos_token": start})
    tokenizer.add_tokens(list(words))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, "bos_token_id": tokenizer.bos_token_id}
    net = model(config(**(SHAPE | sizes), pad_token_id=1, tie_word_embeddings=False))
    with torch.no_grad():
        net.lm_head.weight.mul_(20)
    net.save_pretrained(folder)


def next_logits(folder: Path, model: Any, text: str, **options: Any) -> tuple[PreTrainedTokenizerBase, torch.Tensor]:
    """Return the tokenizer, and the logits of the token after the text."""
    tokenizer = load_tokenizer(folder)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text, **options)["input_ids"]])
        return tokenizer, model.from_pretrained(folder).eval()(ids).logits[0, -1]


@pytest.fixture(scope="module")
def yes_or_no(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Return the folder of a tiny random model of the architecture of HarmBench's classifier."""
    folder = tmp_path_factory.mktemp("yes_or_no")
    save_causal(folder, tiny, LlamaConfig, LlamaForCausalLM, "<s>", "yes", "Yes", " no", "nope")
    return folder
