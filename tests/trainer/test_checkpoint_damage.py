"""A checkpoint that differs from the written one ends in one sentence, with the file and the fix."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.damage import DAMAGES, flip
from helpers.training import Train
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.runtime.errors import UserError

FIX = "Fix: delete it; the stage then starts again"


@pytest.fixture
def checkpoint(train: Train, tmp_path: Path) -> Path:
    with pytest.raises(InterruptedError):
        train(Lisa(2, 3, 1.0, 0.1), stop_after=7)
    return tmp_path / "run.ckpt"


def resumed(train: Train, path: Path) -> str:
    """Return the sentence with which a resumption ends, and require that it names the file."""
    with pytest.raises(UserError) as error:
        train(Lisa(2, 3, 1.0, 0.1))
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [name for name in DAMAGES if name not in ("deleted", "appended") and "bit" not in name]
)
def test_a_damaged_file_is_named(train: Train, checkpoint: Path, damage: str) -> None:
    DAMAGES[damage](checkpoint)
    assert FIX in resumed(train, checkpoint)


@pytest.mark.slow
def test_no_flipped_bit_of_a_tensor_is_loaded(train: Train, checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 100]
    assert len(tensors) > 5
    for entry in tensors[::6]:
        place = entry.header_offset + 200 + entry.file_size // 2
        flip(checkpoint, place / (len(whole) - 1))
        assert FIX in resumed(train, checkpoint)
        checkpoint.write_bytes(whole)


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


def _with_other_tensor(content: dict[str, Any]) -> dict[str, Any]:
    """Replace the first weight by one of its rows, which copying would broadcast."""
    name, weight = next((n, w) for n, w in content["state_dict"].items() if w.dim() == 2 and w.shape[0] > 1)
    return content | {"state_dict": content["state_dict"] | {name: weight[:1]}}


def _with_other_moments(content: dict[str, Any]) -> dict[str, Any]:
    state = content["optimizer_states"][0]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg"][:1]
    return content


FOREIGN: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"without {name}": _without(name)
        for name in ("state_dict", "method_state", "key", "callbacks", "loops", "global_step")
    },
    "of another Lightning": lambda content: content | {"pytorch-lightning_version": "1.9.0"},
    "without a version": _without("pytorch-lightning_version"),
    "a list": lambda content: [content],
    "an anchor of another shape": lambda content: content | {"method_state": {"anchor": [torch.zeros(2)]}},
    "state of another method": lambda content: content | {"method_state": {"other": [torch.zeros(2)]}},
    "weights of another shape": _with_other_tensor,
    "moments of another shape": _with_other_moments,
    "loops of another kind": lambda content: content | {"loops": {"fit_loop": {}}},
    "callbacks of another kind": lambda content: content | {"callbacks": {"Checkpoint": {}}},
    "no moments": lambda content: content | {"optimizer_states": []},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", FOREIGN)
def test_a_file_of_another_version_is_named(train: Train, checkpoint: Path, change: str) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save(FOREIGN[change](content), checkpoint)
    assert FIX in resumed(train, checkpoint)


def test_a_pickle_is_not_executed(train: Train, checkpoint: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": Malicious()}, checkpoint)
    assert FIX in resumed(train, checkpoint)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_written_before_is_read_as_before(train: Train, checkpoint: Path) -> None:
    """A checkpoint whose content is the same, but written anew, is not damaged."""
    buffer = io.BytesIO()
    torch.save(torch.load(checkpoint, weights_only=True), buffer)
    checkpoint.write_bytes(buffer.getvalue())
    train(Lisa(2, 3, 1.0, 0.1))
