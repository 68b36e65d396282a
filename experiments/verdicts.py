"""Verdicts of a claim's runs by prompt, in two files next to results.csv: `write_verdicts` and `read_verdicts`.

`stored_runs` joins them with results.csv.

verdicts.csv has a line for each run and score, with a digit for each answer: 1 if it counts. prompts.csv has the hash
of each prompt, in the order of the digits. Neither file contains text of prompts or answers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from experiments.tables import SCORES, Rows, merge, read, write
from lisa_lightning.evaluation.scores import find_score
from lisa_lightning.report.run_verdicts import VerdictKey, Verdicts
from lisa_lightning.report.sweep_runs import SHOWN_SCORES, Run
from lisa_lightning.runtime.cache import short_hash

VERDICTS: Final = "verdicts.csv"
PROMPTS: Final = "prompts.csv"
StoredVerdicts = Mapping[tuple[str, ...], Mapping[VerdictKey, Verdicts]]
"""Values of the columns that identify a run -> its verdicts by score."""


def write_verdicts(
    folder: Path, runs: Sequence[Run], settings: Sequence[Mapping[str, str]], model: str | None = None
) -> None:
    """Merge the verdicts of runs into the files of a claim. Without stored verdicts, no file is written.

    Args:
        folder: folder of the claim.
        runs: finished runs.
        settings: for each run its columns that identify it, the seed included.
        model: name of the model in the scores of a variant; None: the measured model.

    Raises:
        UserError: if two runs have the same setting and seed.
    """
    rows: Rows = []
    prompts = {(row["prompts"], row["index"]): row["prompt"] for row in read(folder / PROMPTS)}
    for run, setting in zip(runs, settings, strict=True):
        for metric in SHOWN_SCORES:
            score = find_score(run.scores, model or run.measured_model, metric)
            verdicts = run.verdicts(metric, model)
            if score is None or verdicts is None:
                continue
            name = short_hash(verdicts.prompts)
            prompts |= {(name, str(index)): prompt for index, prompt in enumerate(verdicts.prompts)}
            digits = "".join("1" if hit else "0" for hit in verdicts.hits)
            # A leading letter keeps spreadsheets from reading the digits as one number.
            rows.append({**setting, "metric": metric, "judge": score.judge, "prompts": name, "hits": f"h{digits}"})
    if rows:
        write(folder / PROMPTS, [{"prompts": n, "index": i, "prompt": p} for (n, i), p in prompts.items()])
        merge(folder / VERDICTS, rows, [*(key for key in settings[0] if key != "seed"), "metric"])


def read_verdicts(folder: Path, keys: Sequence[str]) -> dict[tuple[str, ...], dict[VerdictKey, Verdicts]]:
    """Return the stored verdicts of each run; {} without files.

    Args:
        folder: folder of the claim.
        keys: columns that identify a run, the seed included.

    Returns:
        Values of `keys` -> verdicts by score, as `Run.all_verdicts` has them for scores without the name of a judge.
    """
    by_name: dict[str, list[str]] = {}
    for row in read(folder / PROMPTS):
        by_name.setdefault(row["prompts"], []).append(row["prompt"])
    runs: dict[tuple[str, ...], dict[VerdictKey, Verdicts]] = {}
    for row in read(folder / VERDICTS):
        verdicts = Verdicts(tuple(by_name[row["prompts"]]), tuple(digit == "1" for digit in row["hits"][1:]))
        runs.setdefault(tuple(row[key] for key in keys), {})["", "final", row["metric"]] = verdicts
    return runs


def stored_runs(rows: Rows, keys: Sequence[str], verdicts: StoredVerdicts) -> list[Run]:
    """Return the runs whose scores are in results.csv.

    Args:
        rows: lines of results.csv.
        keys: columns that distinguish the runs, besides the seed.
        verdicts: values of `keys` and the seed -> verdicts.
    """
    names = [f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")]
    return [
        Run(
            Path(),
            "finished",
            "",
            {"stages": ["finetune"], **{key: row[key] for key in (*keys, "seed")}},
            {key: row[key] for key in ("method", "task") if key in row},
            {f"final/{name}": float(row[name]) for name in names if row.get(name)},
            verdicts.get(tuple(row[key] for key in (*keys, "seed")), {}),
        )
        for row in rows
    ]
