"""Config of the text model in a folder, which may also hold an image encoder: `text_config`."""

from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig

from lisa_lightning.model.base_model import reraise_load_errors

GEMMA3_NAMES: Final = {r"^(model\.)?language_model\.(model\.)?": "model."}
"""Pattern of the names of Gemma 3's text weights, as stored with an image encoder -> their names without."""


def text_config(error_prefix: str, folder: Path) -> Any:
    """Return the config of the model in a folder, and for Gemma 3 with images that of its text model.

    The class of Gemma 3 with images needs token types in training. Its image encoder has modules of the names that LoRA
    targets, and they get no gradient from text. Therefore only the text model is loaded.

    Args:
        error_prefix: beginning of error messages.
        folder: folder of the model.

    Raises:
        UserError: if the config can't be read.
    """
    with reraise_load_errors(error_prefix):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config.get_text_config() if config.model_type == "gemma3" else config
