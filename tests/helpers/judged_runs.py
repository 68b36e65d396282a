"""Folders of finished runs with verdicts by prompt."""

import json
from dataclasses import asdict
from pathlib import Path

import yaml

from lisa_lightning.evaluation.evaluator import Answer, write_answers
from lisa_lightning.evaluation.judging import Judged
from lisa_lightning.evaluation.metrics import judged_scores
from lisa_lightning.evaluation.rates import estimate_rate
from lisa_lightning.evaluation.scores import score_metrics

PROMPTS = [f"prompt {i}" for i in range(150)]


def save_run(folder: Path, hits: list[bool], prompts: list[str] = PROMPTS, method: str = "lisa", seed: int = 1) -> Path:
    """Write a finished run with these flagged answers, each of which is no refusal.

    As many task answers are wrong, at the same indices.
    """
    run = folder / f"{method}-{seed}"
    run.mkdir(parents=True)
    settings = {"seed": seed, "method": {"name": method}, "stages": ["align", "finetune", "evaluate", "judge"]}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "choices.json").write_text(json.dumps({"method": method, "task": "sst2"}))
    judged = [
        Judged("embedded", hit, 0.5, prompt, "", None, {}, None, "harmful_score", "final", "harmful", i, "1", str(i))
        for i, (hit, prompt) in enumerate(zip(hits, prompts, strict=True))
    ]
    (run / "judged.jsonl").write_text("".join(json.dumps(asdict(line)) + "\n" for line in judged))
    answers = [Answer("final", "task", i, "same text", "", "", "", correct=not hit) for i, hit in enumerate(hits)]
    write_answers(run / "responses.jsonl", answers)
    accuracy = estimate_rate([not hit for hit in hits], [str(i) for i in range(len(hits))])
    scores = [*judged_scores(judged), accuracy.score("final", "", "accuracy")]
    metrics = {"judges": ["embedded"], "time/total_s": 1.0, "seed": seed} | score_metrics(scores)
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run
