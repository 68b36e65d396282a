"""Passes with other LoRA factors, which capture inputs: `swapped_factors`, `capture_inputs` and `LayerwiseInputs`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

import torch
from torch import Tensor

from lisa_lightning.data.packing import Pack
from lisa_lightning.model.factors import Factors
from lisa_lightning.model.hooks import decoder_layers, forward_hooks, layer_of_parameters, skip_forward
from lisa_lightning.runtime.errors import UserError


@contextmanager
def swapped_factors(net: Any, factors: Factors) -> Iterator[dict[str, Tensor]]:
    """Yield the model's weights of these names, in evaluation mode and with the values of `factors`.

    The weights may be overwritten inside. Values and mode are restored afterwards, bit for bit.

    Args:
        net: a `PeftModel`.
        factors: values by parameter name.

    Raises:
        UserError: if the model has no factor of such a name and shape.
    """
    parameters = dict(net.named_parameters())
    for name, value in factors.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UserError(
                f"{name}: the model has no factor of this name and shape {tuple(value.shape)}. "
                "Fix: use an adapter of this model"
            )
    weights = {name: parameters[name] for name in factors}
    originals = {name: w.detach().clone() for name, w in weights.items()}
    training = net.training
    net.eval()
    try:
        set_factors(weights, factors)
        yield weights
    finally:
        set_factors(weights, originals)
        net.train(training)


@torch.no_grad()
def set_factors(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite the weights that `values` names."""
    for name, value in values.items():
        weights[name].copy_(value)


@torch.no_grad()
def capture_inputs(
    net: Any, factors: Iterable[str], pack: Pack, on_input: Callable[[str, Tensor], None], masked: bool
) -> None:
    """Run padded rows through the model, and call `on_input` with the input of each factor.

    The pass ends after the last of them. So it skips the unembedding, the most expensive product of a small model.

    Args:
        net: a `PeftModel`.
        factors: parameter names.
        pack: padded rows, on the model's device.
        on_input: receives the name and the input, [R * T, columns].
        masked: pass the attention mask to the model; without it padding counts as tokens.
    """
    assert pack.positions is None, "rows must be padded: a token of a trie belongs to several rows"
    pending = set(factors)

    def hook(name: str, x: Tensor) -> None:
        on_input(name, x.flatten(0, -2))  # OPT flattens the inputs of its MLP itself
        pending.discard(name)
        if not pending:
            raise _InputsComplete

    handles = [
        net.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, inputs, name=name: hook(name, inputs[0])
        )
        for name in tuple(pending)
    ]
    mask = {"attention_mask": pack.mask.long()} if masked else {}
    try:
        with suppress(_InputsComplete):
            net(input_ids=pack.ids, use_cache=False, **mask)
    finally:
        for handle in handles:
            handle.remove()


class _InputsComplete(Exception):
    """Signal to end a forward pass whose remaining output is not needed."""


@final
class LayerwiseInputs:
    """Propagates padded rows one layer at a time, each layer after its factors have been replaced."""

    def __init__(self, net: Any, packs: Sequence[Pack]) -> None:
        self._net = net
        self._packs = [pack.to(next(net.parameters()).device) for pack in packs]
        self._layers = decoder_layers(net)
        self.layer_of = layer_of_parameters(net)
        """Index of the layer of each parameter; parameters outside the layers have no entry."""
        self._finished = 0
        """Number of finished layers."""
        self._outputs: list[Any] = [None] * len(packs)
        """Outputs of the last finished layer, by pack."""

    def inputs(self, layer: int | None, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the inputs of factors of one layer at the answer tokens, after finishing all layers below.

        Args:
            layer: index of the layer; None for factors outside the layers.
            names: parameter names.

        Returns:
            [tokens, columns] by name, in float32 or the model's larger precision; {} without rows.
        """
        captured: dict[str, list[Tensor]] = {name: [] for name in names}
        finished = self._layers[: self._finished]
        previous = [] if layer is None else self._layers[max(0, layer - 1) : layer]
        for i, pack in enumerate(self._packs):
            # The activations are those of the answer tokens, not of the tokens that predict them.
            answer = pack.logit_positions + 1

            def capture(name: str, x: Tensor, answer: Tensor = answer) -> None:
                captured[name].append(x[answer].to(torch.promote_types(x.dtype, torch.float32)))

            def store_output(_: int, out: Any, i: int = i) -> None:
                self._outputs[i] = out

            with skip_forward(finished, self._outputs[i]), forward_hooks(previous, store_output):
                capture_inputs(self._net, names, pack, capture, masked=True)
        self._finished = layer or self._finished
        return {name: torch.cat(tensors) for name, tensors in captured.items() if tensors}
