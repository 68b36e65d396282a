"""Defenses after fine-tuning, one file each: a finished adapter in, a repaired one out.

The package can be called, as `lisa_lightning.repair(model, ...)`: see `_api.repair`.
"""

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Package with the name of a public function. An import of the package would hide the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `_api.repair`."""
        from lisa_lightning.repair._api import repair

        return repair(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        """The signature of `_api.repair`, which help and editors show."""
        from lisa_lightning.repair._api import repair

        return signature(repair)


sys.modules[__name__].__class__ = _CallablePackage
