"""KL divergence from the initial model by token of the answer, which shows how deep a change of a model goes.

Alignment that changes only the first tokens of an answer is shallow (Qi et al. 2025, figure 1). Start at
`token_divergences` for one model, and at `by_position` for the means.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import read_text

FIRST_TOKENS: Final = 5
"""Tokens that count as the start of an answer in metrics.json."""


@dataclass(frozen=True, slots=True)
class PositionKL:
    """Mean KL divergence of a model from the initial one at a token of the answer: a line of token_kl.csv."""

    model: str
    """`aligned` or `final`."""
    token: int
    """Number of the token in the answer, from 1."""
    kl: float
    """Mean over rows, in nats."""
    low: float
    high: float
    """Ends of Student's 95 % interval over rows, at least 0."""
    rows: int
    """Number of answers that have this token."""


def by_position(model: str, divergences: Sequence[Sequence[float]]) -> list[PositionKL]:
    """Return the mean divergence at each token that at least two answers have.

    Args:
        model: name of the model.
        divergences: divergence at each token of each answer, in nats.
    """
    from lisa_lightning.evaluation.paired import student_interval

    positions = []
    for token in range(max(map(len, divergences), default=0)):
        values = [row[token] for row in divergences if len(row) > token]
        if len(values) > 1:
            low, high = student_interval(values)
            positions.append(PositionKL(model, token + 1, fmean(values), max(0.0, low), high, len(values)))
    return positions


def kl_metrics(model: str, divergences: Sequence[Sequence[float]]) -> Metrics:
    """Return the mean divergence over the first tokens of all answers and over the later ones, for metrics.json.

    Args:
        model: name of the model.
        divergences: divergence at each token of each answer, in nats.
    """
    parts = {
        f"first_{FIRST_TOKENS}": [value for row in divergences for value in row[:FIRST_TOKENS]],
        "later": [value for row in divergences for value in row[FIRST_TOKENS:]],
    }
    return {f"{model}/token_kl/{name}": fmean(values) for name, values in parts.items() if values}


def csv_text(positions: Sequence[PositionKL]) -> str:
    """Return the content of token_kl.csv."""
    text = StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(PositionKL)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(position) for position in positions)
    return text.getvalue()


def read_positions(path: Path) -> list[PositionKL]:
    """Return the lines of token_kl.csv, [] without a file.

    Raises:
        UserError: if a line is damaged.
    """
    if not path.exists():
        return []
    reader = csv.DictReader(StringIO(read_text(path)))
    if list(reader.fieldnames or ()) != [field.name for field in fields(PositionKL)]:
        raise _damaged(path, 1)
    return [_parse(path, number, line) for number, line in enumerate(reader, 2)]


def _parse(path: Path, number: int, line: dict[str, Any]) -> PositionKL:
    try:
        kl, low, high = (float(line[name]) for name in ("kl", "low", "high"))
        position = PositionKL(line["model"], int(line["token"]), kl, low, high, int(line["rows"]))
        if not position.token > 0 <= low <= kl <= high < float("inf"):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, number) from error
    return position


def _damaged(path: Path, number: int) -> UserError:
    return UserError(
        f"{path}, line {number}: it is damaged. Fix: delete {path} and repeat the run's command with resume=true"
    )


def token_divergences(
    model: Any, initial: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> list[list[float]]:
    """Return KL(pi || pi_0) in nats at each token of each answer, for a model pi and the initial model pi_0.

    Both read the prompt and the answer's tokens so far, so that no model's own answer matters.

    Args:
        model: a causal language model in evaluation mode.
        initial: the initial model, with the same vocabulary.
        rows: token ids of each prompt and of its answer, neither of them empty.
        batch_size: rows that are computed together.
    """
    import torch

    from lisa_lightning.evaluation.generate import batches

    divergences: list[list[float]] = [[] for _ in rows]
    for indices in batches([[*prompt, *answer] for prompt, answer in rows], batch_size):
        batch = [rows[i] for i in indices]
        inputs, width = _inputs(batch, model.get_input_embeddings().weight.device)
        with torch.no_grad():
            logits, reference = (net(**inputs, logits_to_keep=width + 1).logits[:, :-1] for net in (model, initial))
        for i, (_, answer), p, q in zip(indices, batch, logits, reference, strict=True):
            log_p, log_q = (values[: len(answer)].float().log_softmax(dim=-1) for values in (p, q))
            # A divergence is not negative except for rounding.
            divergences[i] = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0).tolist()
    return divergences


def _inputs(batch: Sequence[tuple[Sequence[int], Sequence[int]]], device: Any) -> tuple[dict[str, Any], int]:
    """Return the inputs of a model, in which all answers begin in the same column, and the number of their columns."""
    import torch

    left, width = (max(len(row[part]) for row in batch) for part in (0, 1))
    padding = [(left - len(prompt), width - len(answer)) for prompt, answer in batch]
    ids = [[0] * a + [*prompt, *answer] + [0] * b for (prompt, answer), (a, b) in zip(batch, padding, strict=True)]
    masks = [[0] * a + [1] * (left + width - a - b) + [0] * b for a, b in padding]
    mask = torch.tensor(masks, device=device)
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": mask}
    return inputs | {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}, width
