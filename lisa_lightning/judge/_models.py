"""What judges that are models of their own share: the tokenizer beside the weights, and where they run."""

from pathlib import Path
from typing import Any

from lisa_lightning.base_model import loading


def load_tokenizer(at: str, folder: Path) -> Any:
    """The tokenizer in the folder. Raises UserError, which begins with `at`, where it can't be loaded."""
    from transformers import AutoTokenizer

    with loading(at):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def best_device() -> str:
    """Where to run: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
