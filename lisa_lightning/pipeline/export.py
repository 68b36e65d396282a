"""Export of a finished run as a model that plain transformers loads on any machine: `export`."""

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lisa_lightning.model.full import save_full
from lisa_lightning.model.lora import DTYPES, load, load_tokenizer, save_merged
from lisa_lightning.model.lora_folder import attach_adapter
from lisa_lightning.pipeline.adapter_folder import locate_base, read_adapter, read_model
from lisa_lightning.report.model_card import CARD, merged_card
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import apply_umask, disk_error, flush, reraise_write_errors, write_text
from lisa_lightning.runtime.run_files import CONFIG, MODEL, is_complete, read_config, read_metrics, refuse_changed
from lisa_lightning.runtime.upload import refuse_upload, upload

log = logging.getLogger(__name__)


def export(run: str | Path, out: str | Path, push_to_hub: str | None = None) -> Path:
    """Write the model of a finished run as a self-contained one. Its adapter, if it has one, is merged.

    The folder receives safetensors weights in the run's data type, configs, the tokenizer and a model card. Weights are
    merged on the CPU and without quantization. The folder is either complete or absent.

    Example:
        `lisa_lightning.export("outputs/mine", "exported")`

    Args:
        run: folder of a finished run. It may come from another person: its files are read as data.
        out: folder to write, absent or empty.
        push_to_hub: hub id of a private repository that the folder is uploaded to; None uploads nothing.

    Returns:
        The absolute path of the written folder.

    Raises:
        UserError: if the run is unfinished, damaged or without an adapter; its model is no longer in the cache; the
            folder is not empty or can't be written; the hub rejects the upload.
    """
    run, out = (Path(path).expanduser().absolute() for path in (run, out))
    if push_to_hub is not None:
        refuse_upload(push_to_hub)
    config, metrics = _read_finished(run)
    _refuse_occupied(out)
    save = _full_model(run, config) if (run / MODEL).exists() else _merged_model(run, config)
    with _new_folder(out) as part:
        save(part)
        write_text(part / CARD, merged_card(run, metrics))
    log.info("%s holds the model, its tokenizer and its card.", out)
    if push_to_hub is not None:
        log.info("Uploaded: %s", upload(out, push_to_hub))
    return out


def _merged_model(run: Path, config: Mapping[str, Any]) -> Callable[[Path], None]:
    """Return a function that saves the model of a run, in which its adapter is merged."""
    adapter = read_adapter(run)
    base = locate_base(run, config, adapter)
    log.info("Merging %s into %s", adapter.folder, base)
    tokenizer = load_tokenizer(base)
    # Attention does not matter here, and every model has the eager one.
    net = attach_adapter(load(base, _dtype(run, config), "eager"), adapter)
    return lambda out: save_merged(net, tokenizer, out)


def _full_model(run: Path, config: Mapping[str, Any]) -> Callable[[Path], None]:
    """Return a function that saves the fully fine-tuned model of a run.

    The model is loaded and saved rather than copied, so that nothing else in a foreign folder gets into the export.
    """
    folder, dtype = read_model(run), _dtype(run, config)
    log.info("Exporting %s", folder)
    model = load(folder, dtype, "eager")
    return lambda out: save_full(model, dtype, folder, out)


def _read_finished(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config and metrics of a finished run. Raise UserError if it is none, or damaged."""
    config = read_config(run)
    if config is None:
        raise UserError(f"{run} holds no run, which has a {CONFIG}. Fix: name the folder of a run")
    refuse_changed(run)
    metrics = read_metrics(run)
    if not is_complete(metrics):
        raise UserError(f"{run}: the run is not finished. Fix: repeat the run's command with resume=true")
    return config, metrics


def _refuse_occupied(out: Path) -> None:
    """Raise UserError if `out` exists, unless it is an empty folder."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} exists and is no empty folder. Fix: name a new folder")


def _dtype(run: Path, config: Mapping[str, Any]) -> str:
    section = config.get("model")
    dtype = section.get("dtype") if isinstance(section, dict) else None
    if dtype not in DTYPES:
        raise UserError(
            f"{run / CONFIG}: model.dtype={printable(str(dtype))[:80]} is not one of {', '.join(DTYPES)}. Fix: restore "
            "the file"
        )
    return dtype


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `out`. It is renamed to `out` afterwards, or deleted after an error."""
    part = out.with_name(f"{out.name}.part-{uuid.uuid4().hex[:8]}")
    with reraise_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    try:
        yield part
        with reraise_write_errors(out):
            apply_umask(part)
            flush(part)
            part.replace(out)
    except Exception as error:
        if isinstance(error, UserError) or (reason := disk_error(error)) is None:
            raise
        raise UserError(f"{out} can't be written: {reason}. Fix: name a folder on another disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
