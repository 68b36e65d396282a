"""The pipeline from Python: `run`, exported as `lisa_lightning.run`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import open_dict

from lisa_lightning.config.arguments import prepare_arguments
from lisa_lightning.config.explain import explain
from lisa_lightning.config.paths import CONF
from lisa_lightning.config.validate import check
from lisa_lightning.pipeline.request import Request
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import drop_unused


def run(*overrides: str, out: str | Path | None = None, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Run the pipeline in this process, and return the content of metrics.json.

    It does what the command does with the same overrides. It can be called repeatedly, from a notebook, and within
    another Hydra app: Hydra's global state, logging and signal handlers are the same afterwards.

    Example:
        `lisa_lightning.run("experiment=smoke", "method.rho=1", out="outputs/mine")`

    Args:
        *overrides: overrides of the command, such as `method=sft` or `optim.lr=1e-4`. Flags are not accepted.
        out: output folder; None for the command's default, `hydra.run.dir`.
        config_dir: folder with further config files, as the command's `--config-dir`.

    Raises:
        UserError: if the user can fix the problem, with the message of the command.
    """
    unused = None
    try:
        request = compose_request(overrides, out, config_dir)
        if not request.out.exists():
            unused = request.out
        check(request.cfg)
        from lisa_lightning.pipeline.run import run as run_pipeline

        return run_pipeline(request)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if unused is not None:
            drop_unused(unused)
        if isinstance(error, UserError) and str(error) == sentence:
            raise
        raise UserError(sentence) from error


def compose_request(
    overrides: Sequence[str], out: str | Path | None = None, config_dir: str | Path | None = None
) -> Request:
    """Compose the config of these overrides, which remains to be checked.

    Args:
        overrides: overrides as in the command, without flags.
        out: output folder; None for `hydra.run.dir`.
        config_dir: folder with further config files.

    Raises:
        UserError: if an override is a flag or cannot be parsed, or there is no such `config_dir`.
        HydraException: if Hydra cannot compose the config.
    """
    if flags := [override for override in overrides if override.startswith("-")]:
        raise UserError(f"{flags[0]}: flags of the command are not accepted. Fix: leave it out")
    arguments = prepare_arguments(overrides)
    if config_dir is not None:
        arguments = [_search_path(config_dir), *arguments]
    with _temporary_hydra():
        cfg = compose("config", arguments, return_hydra_config=True)
        hydra = cfg.hydra
        # The default folder contains the current time, which is resolved only once.
        folder = Path(hydra.run.dir if out is None else out).expanduser().absolute()
        with open_dict(cfg):
            del cfg["hydra"]
    return Request.from_hydra(cfg, hydra, folder)


def _search_path(config_dir: str | Path) -> str:
    """Return the override by which Hydra searches a further folder."""
    folder = Path(config_dir).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"config_dir={config_dir}: there is no such folder. Fix: name a folder of config files")
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.searchpath=['file://{escaped}']"


@contextmanager
def _temporary_hydra() -> Iterator[None]:
    """Initialize Hydra for this package's configs, and restore its global state afterwards."""
    instance, version = GlobalHydra.instance(), VersionBase.instance()
    hydra, base = instance.hydra, version.version_base
    instance.clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        # Hydra itself restores a copy of the instance.
        instance.hydra = hydra
        GlobalHydra.set_instance(instance)
        version.version_base = base
