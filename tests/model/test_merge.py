"""Merging by files: the weights and configs that peft's merge in memory gives, whatever the architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_lightning.config.settings import Lora
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.lora import attach, load, load_tokenizer, save_merged
from lisa_lightning.model.merge import merge_files

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259},
    "gemma2": SIZES | {"head_dim": 8},
    "llama": SIZES,
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": SIZES | {"tie_word_embeddings": True},
}


def save_model(kind: str, dtype: torch.dtype, tiny: Path, out: Path) -> Path:
    """Save a random model in several files, with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).to(dtype)
    model.save_pretrained(out, max_shard_size="30KB")
    load_tokenizer(tiny).save_pretrained(out)
    return out


def adapted(base: Path, dtype: str) -> Any:
    """Return the model with a random adapter."""
    net = attach(load(base, dtype, "eager"), Lora(r=4, alpha=6, dropout=0.0, targets="all-linear"), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.normal_(std=0.1)
    return net


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # GPT-2 stores transposed weights
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged_files_are_those_of_a_merge_in_memory(kind: str, dtype: str, tiny: Path, tmp_path: Path) -> None:
    base = save_model(kind, torch.float32, tiny, tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 1
    by_files, in_memory = tmp_path / "files", tmp_path / "memory"
    by_files.mkdir()
    assert merge_files(adapted(base, dtype), base, dtype, by_files)
    save_merged(adapted(base, dtype), load_tokenizer(base), in_memory)
    models = [load(folder, dtype, "eager").state_dict() for folder in (by_files, in_memory)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())
    assert any(
        not torch.equal(weight, load(base, dtype, "eager").state_dict()[name]) for name, weight in models[0].items()
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((by_files / name).read_text()) == json.loads((in_memory / name).read_text()), name


def test_files_with_other_names_than_the_model_are_left_to_a_merge_in_memory(tiny: Path, tmp_path: Path) -> None:
    base = save_model("llama", torch.float32, tiny, tmp_path / "base")
    net = adapted(base, "float32")
    for file in base.glob("*.safetensors"):
        renamed = {name.replace("q_proj", "query"): weight for name, weight in load_file(file).items()}
        save_file(renamed, file, {"format": "pt"})
    (tmp_path / "out").mkdir()
    assert not merge_files(net, base, "float32", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
