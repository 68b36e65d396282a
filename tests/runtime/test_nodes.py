"""Nodes of a run before and during their work: rank zero by variables of launchers, and a stop by a signal."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lisa_lightning.callbacks.stop_signal import StopSignal
from lisa_lightning.runtime.launch import is_rank_zero
from lisa_lightning.runtime.stop import STOP_SIGNALS, Stopped


@pytest.mark.parametrize(("name", "node", "expected"), [("NODE_RANK", "1", False), ("GROUP_RANK", "0", True)])
def test_the_first_process_of_another_node_is_not_rank_zero(
    monkeypatch: pytest.MonkeyPatch, name: str, node: str, expected: bool
) -> None:
    monkeypatch.setenv(name, node)
    assert is_rank_zero() == expected


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_stops_training_after_the_step(number: signal.Signals) -> None:
    handlers = {one: signal.getsignal(one) for one in STOP_SIGNALS}
    stop, module = StopSignal(), SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=1, should_stop=False)
    try:
        stop.on_fit_start(trainer, module)  # type: ignore[arg-type]
        stop.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
        stop.raise_received()
        assert not trainer.should_stop
        signal.raise_signal(number)
        stop.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert trainer.should_stop
    with pytest.raises(Stopped) as stopped:
        stop.raise_received()
    assert stopped.value.code == 128 + number
