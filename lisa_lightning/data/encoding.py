"""Rows to token ids and labels."""

from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.packing import IGNORED, Example
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import Template, encode_prompt
from lisa_lightning.errors import UserError


def encode(tokenizer: PreTrainedTokenizerBase, template: Template, row: Row, max_length: int) -> Example:
    """Prompt (not learnt), answer and end of text (learnt), cut at `max_length` tokens.

    Prompt and answer are tokenized apart and joined as ids, so that the label mask is exact.

    Raises:
        UserError: the tokenizer has no end of text, or not the template.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("This model's tokenizer has no end of text (eos_token), with which every answer must be learnt")
    prompt = encode_prompt(tokenizer, template, row.instruction, row.context)
    answer = tokenizer(row.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + answer)[:max_length]
    labels = ([IGNORED] * len(prompt) + answer)[:max_length]
    return Example(tuple(ids), tuple(labels))
