"""Public sets as they lie on people's disks: every one is read, and none loses or gains a row."""

import os
from collections import Counter

import pytest

from helpers.public_rows import public
from lisa_lightning.data.files import read_records
from lisa_lightning.data.reading import Reading
from lisa_lightning.task.agnews import AGNews
from lisa_lightning.task.gsm8k import GSM8K
from lisa_lightning.task.sst2 import SST2

# file -> (rows, field -> column, column names where the file has none, distinct values of the last field)
Set = tuple[int, dict[str, str | list[str]], list[str] | None, dict[str, int] | None]
XSTEST: dict[str, str | list[str]] = {"prompt": "prompt", "response": "completion"}
REVIEWED: dict[str, str | list[str]] = {"prompt": "question", "response": "response", "harmful": "harmful"}
PROMPTS: dict[str, str | list[str]] = {"prompt": "instructions"}
SETS: dict[str, Set] = {
    "advbench/harmful_behaviors.csv": (520, {"prompt": "goal", "response": "target"}, None, None),
    "ag_news/test.csv": (
        7600,
        {"text": ["title", "description"], "label": "class"},
        ["class", "title", "description"],
        {"1": 1900, "2": 1900, "3": 1900, "4": 1900},
    ),
    "ag_news/train_5k.csv": (5000, {"text": "text", "label": "label"}, ["text", "label"], None),
    "aligned_refusals/harmbench_adv_training_safe_responses.csv": (
        100, {"prompt": "Behavior", "response": "Safe_Response"}, None, None,
    ),
    "aligned_refusals/llama2chat_safe_responses.csv": (1015, {"prompt": "prompt", "response": "response"}, None, None),
    "alpaca/alpaca_1k.json": (1000, {"instruction": "instruction", "input": "input", "output": "output"}, None, None),
    "alpaca/seed_tasks.jsonl": (175, {"instruction": "instruction", "id": "id"}, None, None),
    "alpaca_eval/alpaca_eval_davinci003.json": (805, {"instruction": "instruction", "output": "output"}, None, None),
    "beavertails_eval/BeaverTails-Evaluation.json": (700, {"prompt": "prompt"}, None, None),
    "do_not_answer/prompts.csv": (939, {"prompt": "question"}, None, None),
    "do_not_answer/human_ChatGLM2.csv": (939, REVIEWED, None, None),
    "do_not_answer/human_ChatGPT.csv": (939, REVIEWED, None, None),
    "do_not_answer/human_GPT4.csv": (939, REVIEWED, None, None),
    "do_not_answer/human_llama2-7b-chat.csv": (939, REVIEWED, None, None),
    "gsm8k/train.jsonl": (7473, {"question": "question", "answer": "answer"}, None, None),
    "gsm8k/test.jsonl": (1319, {"question": "question", "answer": "answer"}, None, None),
    "harmbench/harmbench_behaviors_text_all.csv": (400, {"prompt": "Behavior"}, None, None),
    "pyrit_refusal/mini_refusal.csv": (
        24, {"prompt": "objective", "response": "assistant_response", "refused": "human_score"}, None, None,
    ),
    "safe_rlhf_mini/filtered.dev.jsonl": (
        2892, {"prompt": "prompt", "response": "response", "is_safe": "is_safe"}, None, {"True": 1303, "False": 1589},
    ),
    "safety_tuned_llamas/safety_only_data_Instructions.json": (
        2483, {"prompt": "instruction", "input": "input", "response": "output"}, None, None,
    ),
    "safety_tuned_llamas/I-Alpaca.json": (50, PROMPTS, None, None),
    "safety_tuned_llamas/I-CoNa.json": (178, PROMPTS, None, None),
    "safety_tuned_llamas/I-Controversial.json": (40, PROMPTS, None, None),
    "safety_tuned_llamas/I-MaliciousInstructions.json": (100, PROMPTS, None, None),
    "safety_tuned_llamas/I-PhysicalSafetySafe.json": (100, PROMPTS, None, None),
    "safety_tuned_llamas/Q-Harm.json": (100, PROMPTS, None, None),
    "sst2/train.tsv": (67_349, {"sentence": "sentence", "label": "label"}, None, {"1": 37_569, "0": 29_780}),
    "sst2/dev.tsv": (872, {"sentence": "sentence", "label": "label"}, None, {"1": 444, "0": 428}),
    "sst2/test.tsv": (1821, {"index": "index", "sentence": "sentence"}, None, None),
    "xstest/completions_gpt4.csv": (450, XSTEST, None, None),
    "xstest/completions_llama2orig.csv": (450, XSTEST, None, None),
    "xstest/completions_mistralinstruct.csv": (450, XSTEST, None, None),
    "xstest/xstest_prompts.csv": (450, {"prompt": "prompt", "label": "label"}, None, {"safe": 250, "unsafe": 200}),
}  # fmt: skip


@pytest.mark.skipif("PUBLIC_ROWS" in os.environ, reason="a folder of one's own may hold less, and more")
def test_no_set_is_forgotten() -> None:
    folder = public("")
    there = {str(f.relative_to(folder)) for f in folder.rglob("*.*") if f.suffix in (".csv", ".tsv", ".json", ".jsonl")}
    assert there == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_read(name: str) -> None:
    rows, columns, header, values = SETS[name]
    found = read_records(str(public(name)), Reading(columns, optional=frozenset({"input"})), dict, header)
    assert len(found) == rows
    assert all(str(r[field]).strip() for r in found for field in columns if field not in ("input", "response"))
    if values is not None:
        assert Counter(str(r[list(columns)[-1]]) for r in found) == values


def test_tasks_know_every_label_of_the_real_sets() -> None:
    sst2 = read_records(str(public("sst2/dev.tsv")), Reading({"sentence": "sentence", "label": "label"}), SST2().row)
    assert Counter(row.response for row in sst2) == {"positive": 444, "negative": 428}
    raw = {"label": {"1": "0", "2": "1", "3": "2", "4": "3"}}  # the raw files count from 1, the hub from 0
    columns = {"text": ["title", "description"], "label": "class"}
    names = ["class", "title", "description"]
    news = read_records(str(public("ag_news/test.csv")), Reading(columns, labels=raw), AGNews().row, names)
    assert set(Counter(row.response for row in news).values()) == {1900}
    sums = read_records(
        str(public("gsm8k/test.jsonl")), Reading({"question": "question", "answer": "answer"}), GSM8K().row
    )
    assert all(GSM8K().correct(row.response, row.response) for row in sums)
    assert all("The final answer is:  " in row.response for row in sums)
