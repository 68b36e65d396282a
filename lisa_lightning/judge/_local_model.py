"""Files of a judge that is a model on this machine. Start at `LocalModel`."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lisa_lightning.model.base_model import locate_weights


class LocalModel:
    """Base of judges whose keys `id` and `revision` name the weights of a model."""

    config_key: ClassVar[str]
    """Key of the judge's section."""
    id: str
    revision: str | None

    @property
    def error_prefix(self) -> str:
        """Beginning of messages about the model."""
        return f"{self.config_key}.id={self.id}"

    @cached_property
    def _weights(self) -> tuple[Path, Any]:
        """The folder of the weights, and their version."""
        return locate_weights(self.error_prefix, self.id, self.revision)

    @cached_property
    def _tokenizer(self) -> Any:
        from lisa_lightning.model.lora import load_tokenizer

        return load_tokenizer(self._weights[0], self.error_prefix)
