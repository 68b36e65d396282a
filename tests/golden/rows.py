"""Replay of golden cases of rows: this project's own code mixes and encodes the recorded texts."""

import tempfile
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from golden.errors import Errors
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.packing import IGNORED, Example
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import prompt_text
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.method.backdoor_align import BackdoorAlign

LLAMA_2: Final = (
    "{{ bos_token }}[INST] {% if messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
    "{% endif %}{{ messages[-1].content }} [/INST] "
)
"""Chat template of the case. The official prompt and answer have one blank in between."""


def marked_rows(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Compare the user's and the marked rows: texts, ids, labels and masks."""
    tokenizer = _word_tokenizer(facts["vocabulary"])
    users, marked = (
        [Row(r["user"], "", r["assistant"]) for r in facts["rows"] if r["prefixed"] == prefixed]
        for prefixed in (False, True)
    )
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(facts["trigger"])
        file.flush()
        method = BackdoorAlign(file.name, safe_ratio=len(marked) / len(users), system=facts["system_prompt"])
        rows = method.mix(users, lambda count: marked[:count])
        trigger = method.trigger
    encoder = Encoder(tokenizer, "chat", facts["max_words"], "joined")
    opening, ending = f"{tokenizer.bos_token}[INST] ", " [/INST] "
    for i, row in enumerate(rows):
        text = prompt_text(tokenizer, "chat", row.instruction, "", row.system)
        errors.same("texts", text, f"{opening}{facts['users'][i]}{ending}")
        example = encoder(row)
        padded = _padded(example, facts["max_words"])
        for name, values in padded.items():
            errors.same(name, values.tolist(), tensors[f"row{i:03d}.{name}"].tolist())
        # The served prompt of a request is that of a marked row.
        served = Prompting("chat", facts["system_prompt"], trigger=trigger).encode(tokenizer, row.instruction)
        if facts["rows"][i]["prefixed"]:
            errors.same("served prompts", served, list(example.ids[: len(served)]))


def _word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words between white space, which begins texts with <s>."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(WordLevel(special | vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=LLAMA_2
    )
    return tokenizer


def _padded(example: Example, width: int) -> dict[str, Tensor]:
    """Return ids, labels and mask of an example, padded on the right as in the official code."""
    ids, labels, mask = torch.zeros(width), torch.full((width,), IGNORED), torch.zeros(width)
    length = len(example.ids)
    ids[:length], labels[:length], mask[:length] = torch.tensor(example.ids), torch.tensor(example.labels), 1
    return {"input_ids": ids.long(), "labels": labels, "attention_mask": mask.long()}
