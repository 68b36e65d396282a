"""Default of the config key `stages`: OmegaConf resolver `default_stages`, which conf/config.yaml calls."""

from typing import Final, Literal, get_args

from omegaconf import OmegaConf

Stage = Literal["curate", "align", "finetune", "repair", "evaluate", "judge"]
STAGES: Final = get_args(Stage)
"""Stages in their order."""
TRAINING_STAGES: Final = STAGES[:3]
"""Stages that do not run for a finished adapter."""


def default_stages(adapter: str | None) -> list[str]:
    """Return the stages of a run: all of them, or those after the training if an adapter is supplied.

    Args:
        adapter: config key `adapter`.
    """
    return [stage for stage in STAGES if adapter is None or stage not in TRAINING_STAGES]


OmegaConf.register_new_resolver("default_stages", default_stages, replace=True)
