"""SaLoRA: an adapter whose output stays orthogonal to the main directions of the outputs on safety rows."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from lisa_lightning.config.fields import STRICT, Count
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.method.base import Method
from lisa_lightning.model.factor_inputs import LayerwiseInputs, set_factors, swapped_factors
from lisa_lightning.model.factors import Factors, adapted_embeddings, modules, stack
from lisa_lightning.model.sharding import whole
from lisa_lightning.objective.backprop import Backprop, State
from lisa_lightning.objective.loss import no_autocast
from lisa_lightning.objective.proximal import snapshot
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class SaLoRA(Method):
    """Fine-tune behind a fixed projection, from a task-specific start (Li et al., ICLR 2025).

    An adapted layer computes

        W x + s (C B A x - C B0 A0 x),    C = I - V V^T,    s = alpha/r

    so that its change is orthogonal to V, and at the start it is 0. B and A start at B0 and A0.

    V has the leading `safety_rank` right singular vectors of the outputs X W^T on the answer tokens of alignment rows.
    With W = U S Vh and the same vectors V_t of user rows,

        B0 = V_t V_t^T U sqrt(S/s),    A0 = sqrt(S/s) Vh

    cut to rank r. Layers are processed in order: user rows pass earlier layers with W - s C B0 A0 in place of W.

    One forward and one backward pass a step, with factors of twice the rank. Before the first step, one forward pass
    over each kind of rows, and an exact singular value decomposition of each adapted matrix.

    Memory: A0, C B0 and V of each adapted layer, not C. In the passes before the first step the hidden states after one
    layer, and the inputs of a layer's modules at the answer tokens.

    The saved adapter is a plain one of rank 2r, with the factors [C B, -C B0] and [A; A0]. After a training in Python
    `LisaModule.finish()` returns the model with it.

    Departures from the official code:
        - The safety rows are alignment rows. The official ones are harmful prompts with safe answers.
        - Rows are evenly spaced, and only their answers count. The official code takes the first rows and all tokens.
        - W is unchanged. The official code replaces it by W - C B0 A0, so that its adapter belongs on that model alone.
        - Singular vectors are exact. The official ones are randomized, inexact where the spectrum has no gap.
        - alpha/r may differ from 1, the official value. The start of training is the same for any.
        - Dropout of inputs applies to the whole change, so that the change is 0 at the start. The official code has no
          dropout.
        - Its option for five kinds of modules fails. Any linear layer can be adapted here.
    """

    safety_rank: Count = 32
    """Directions that the adapter leaves unchanged, fewer than any adapted layer has outputs. The official code has
    32."""
    task_rank: Count = 32
    """Directions of the user rows' outputs to which B0 is restricted. The official code has 32."""
    safety_rows: Count = 128
    """Alignment rows whose outputs determine V, evenly spaced. The official code has 128."""
    task_rows: Count = 128
    """User rows whose outputs determine V_t, evenly spaced. The official code has 128."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """A separate adapter, since it gets other values at the start, and no reference of the rank before."""
        return frozenset({"adapter", "stacked_adapters", "repair_without_reference"})

    def init(self, backprop: Backprop) -> State:
        """Return the state before the start.

        Raises:
            UserError: if a layer has no output left outside V, or fewer singular vectors than the adapter's rank; if an
                embedding is adapted, or the model has no list of layers.
        """
        _ = backprop.layers
        shapes = {name: tuple(w.shape) for name, w in zip(backprop.names, backprop.weights, strict=True)}
        pairs = modules(shapes)
        if embeddings := adapted_embeddings(shapes):
            raise UserError(f"lora.targets: method=salora adapts linear layers. Fix: remove {embeddings[0]}")
        for module, (a, b) in pairs.items():
            (rank, inputs), (outputs, _) = shapes[a], shapes[b]
            if self.safety_rank >= outputs:
                raise UserError(
                    f"method.safety_rank={self.safety_rank}: {module} has {outputs} outputs, so its adapter could "
                    f"change nothing. Fix: method.safety_rank={outputs - 1} or less"
                )
            if rank > min(inputs, outputs):
                raise UserError(
                    f"lora.r={rank}: {module} has only {min(inputs, outputs)} singular vectors to start from. "
                    f"Fix: lora.r={min(inputs, outputs)} or less"
                )
        return super().init(backprop)

    def start(self, backprop: Backprop, state: State) -> State:
        """Set A0 and B0 at the start of a training, and let the adapted layers compute with C from now on.

        Raises:
            UserError: if there are no alignment rows or no user rows with an answer.
        """
        if "projection" not in state:
            state = state | self._initialize(backprop)
        for pair, v, a0, b0 in _with_state(backprop.names, state):
            lora_a, lora_b = (backprop.net.get_submodule(name.removesuffix(".weight")) for name in pair)
            vars(lora_a)["forward"] = partial(_forward_a, lora_a, a0)
            vars(lora_b)["forward"] = partial(_forward_b, lora_b, v, b0)
        return state

    def finish(self, factors: Factors, state: State) -> Factors:
        """Return the plain adapter of twice the rank that computes the same."""
        projected, start = dict(factors), Factors()
        for (a, b), v, a0, b0 in _with_state(factors, state):
            projected[b] = _project(v, factors[b])
            start |= {a: a0, b: -b0}
        return stack(projected, start)

    @torch.no_grad()
    def _initialize(self, backprop: Backprop) -> State:
        """Set the weights to A0 and B0. Return V, A0 and C B0 of each adapted layer, and these weights as anchor."""
        safety = LayerwiseInputs(backprop.net, _spaced_rows(backprop, "alignment", self.safety_rows))
        task = LayerwiseInputs(backprop.net, _spaced_rows(backprop, "user", self.task_rows))
        weights = dict(zip(backprop.names, backprop.weights, strict=True))
        pairs = modules(weights)
        original: Factors = {b: torch.zeros_like(weights[b]) for _, b in pairs.values()}
        reduced, initial = dict(original), Factors()
        state: State = {"projection": [], "start_a": [], "start_b": []}
        with no_autocast(backprop.device), swapped_factors(backprop.net, weights):
            for layer, group in groupby(pairs.items(), key=lambda item: safety.layer_of.get(item[1][0])):
                named = dict(group)
                names = [a for a, _ in named.values()]
                set_factors(weights, original)
                safety_inputs = safety.inputs(layer, names)
                set_factors(weights, reduced)
                task_inputs = task.inputs(layer, names)
                for a, b in named.values():
                    adapted = backprop.net.get_submodule(a.partition(".lora_A.")[0])
                    w = _Decomposed(backprop, adapted, weights[a].dtype)
                    v = w.leading_outputs(safety_inputs.get(a), self.safety_rank)
                    v_task = w.leading_outputs(task_inputs.get(a), self.task_rank)
                    a0, b0 = w.factors(len(weights[a]), adapted.scaling["default"])
                    b0 = v_task @ (v_task.T @ b0)
                    initial |= {a: a0, b: b0}
                    reduced |= {a: a0, b: -_project(v, b0)}
                    for name, tensor in (("projection", v), ("start_a", a0), ("start_b", _project(v, b0))):
                        state[name].append(tensor)
        backprop.set_weights([initial[name] for name in backprop.names])
        return state | {"anchor": snapshot(backprop.weights)}


class _Decomposed:
    """Singular value decomposition W = U S Vh of an adapted matrix."""

    def __init__(self, backprop: Backprop, adapted: Any, dtype: torch.dtype) -> None:
        # Importing peft takes seconds, and methods are also imported only for their settings.
        from peft.utils.integrations import dequantize_module_weight

        weight = whole(dequantize_module_weight(adapted.get_base_layer())).to(dtype)
        weight = weight.T if getattr(adapted, "fan_in_fan_out", False) else weight
        self.u, self.s, self.vh = torch.linalg.svd(weight, full_matrices=False)
        self._backprop = backprop

    def factors(self, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] such that scaling * B A is the best approximation of W."""
        root = (self.s[:rank] / scaling).sqrt()
        return root[:, None] * self.vh[:rank], self.u[:, :rank] * root

    def leading_outputs(self, inputs: Tensor | None, rank: int) -> Tensor:
        """Return the leading right singular vectors of X W^T over all ranks, [out, k] with k up to `rank`.

        Args:
            inputs: X [tokens, in] of this rank; None without rows.
            rank: number of vectors. Directions that no output has are left out.
        """
        uppers: list[Tensor] = []
        if inputs is not None:
            # X W^T is X (S Vh)^T U^T. A triangular factor has the singular vectors of all its rows.
            scores = inputs.to(self.s.dtype) @ (self.s[:, None] * self.vh).T
            uppers.append(torch.linalg.qr(scores, mode="r").R[None])
        gathered, _ = self._backprop.all_gather_rows(uppers, len(self.s))
        gathered = gathered.flatten(0, 1)
        _, values, right = torch.linalg.svd(gathered, full_matrices=False)
        # Vectors of singular values that are 0 up to rounding are arbitrary.
        nonzero = int((values > values[0] * max(gathered.shape) * torch.finfo(values.dtype).eps).sum())
        return self.u @ right[: min(rank, nonzero)].T


def _spaced_rows(backprop: Backprop, stream: Stream, count: int) -> list[Pack]:
    """Return this rank's share of rows of a stream, evenly spaced, padded. Raises UserError if none has an answer."""
    batch = next(backprop.iter_stream(stream, count, padded=True, rows=count), None)
    if batch is None or not batch.tokens:
        raise UserError(
            f"method=salora: needs {stream} rows with an answer, and none of {count} has one. "
            f"Fix: add {stream} rows, or set a larger data.max_length"
        )
    return [pack for packs in batch.nonempty for pack in packs]


def _with_state(names: Iterable[str], state: State) -> Iterator[tuple[tuple[str, str], Tensor, Tensor, Tensor]]:
    """Yield the names of A and B of each adapted layer, with its V, A0 and C B0."""
    yield from zip(modules(names).values(), state["projection"], state["start_a"], state["start_b"], strict=True)


def _project(v: Tensor, b: Tensor) -> Tensor:
    """Return C B = B - V V^T B, [out, r], in the precision of B."""
    with no_autocast(b.device):
        return b - v @ (v.T @ b)


def _forward_a(lora_a: Any, a0: Tensor, x: Tensor) -> Tensor:
    """Return [A x, A0 x], [..., 2r]."""
    return F.linear(x, torch.cat([lora_a.weight, a0]))


def _forward_b(lora_b: Any, v: Tensor, b0: Tensor, x: Tensor) -> Tensor:
    """Return C B A x - C B0 A0 x, [..., out], of [A x, A0 x]."""
    return F.linear(x, torch.cat([_project(v, lora_b.weight), -b0], 1))
