"""Text model in the folder of a model that also reads images: `text_part`."""

from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM

from lisa_lightning.model.base_model import reraise_load_errors

GEMMA3_NAMES: Final = {r"^(model\.)?language_model\.(model\.)?": "model."}
"""Pattern of the names of Gemma 3's text weights, as stored with an image encoder -> their names without."""


def text_part(error_prefix: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the class of transformers for the text model in a folder, and options of its `from_pretrained`.

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
    if config.model_type != "gemma3":
        return AutoModelForCausalLM, {}
    return Gemma3ForCausalLM, {"config": config.get_text_config(), "key_mapping": GEMMA3_NAMES}
