"""Encode rows as token ids and labels: `encode`, and `Encoder` with its settings."""

from dataclasses import dataclass
from typing import final

from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.packing import IGNORED, Example
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import Template, encode_prompt
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True)
class Encoder:
    """Encodes rows for one tokenizer, template and maximum length."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    """Tokens of an example; the rest is truncated."""

    def __call__(self, row: Row) -> Example:
        """Return the example of a row; see `encode`."""
        return encode(self.tokenizer, self.template, row, self.max_length)


def encode(tokenizer: PreTrainedTokenizerBase, template: Template, row: Row, max_length: int) -> Example:
    """Return the example of a row: prompt (not learnt), answer and end of text (learnt), truncated to `max_length`.

    Prompt and answer are tokenized separately and their ids are concatenated, so that the label mask is exact. Only a
    prefix of a long text is tokenized.

    Args:
        tokenizer: tokenizer of the model.
        template: template of the prompt.
        row: instruction, input and answer.
        max_length: maximum number of tokens of the example.

    Returns:
        An example. Its `supervised` is 0 if the entire answer is cut off.

    Raises:
        UserError: if the tokenizer has no end-of-text token, or no chat template for `template="chat"`.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(
            "model.id: the tokenizer has no end of text (eos_token), which every answer must end with. "
            "Fix: set eos_token in tokenizer_config.json, or choose another model"
        )
    prompt = encode_prompt(tokenizer, template, row.instruction, row.context, max_length)
    answer = first_ids(tokenizer, row.response, max_length, add_special_tokens=False)
    answer.append(eos)
    ids = (prompt + answer)[:max_length]
    labels = ([IGNORED] * len(prompt) + answer)[:max_length]
    return Example(tuple(ids), tuple(labels))


def prompt_length(
    tokenizer: PreTrainedTokenizerBase, template: Template, instruction: str, context: str, limit: int
) -> int:
    """Return the number of tokens of a prompt, without tokenizing much more than `limit` of them.

    Args:
        tokenizer: tokenizer of the model.
        template: template of the prompt.
        instruction: instruction of the row.
        context: input of the row, or "".
        limit: number up to which the result must be exact.

    Returns:
        The exact number if it is at most `limit`, otherwise some number above `limit`.

    Raises:
        UserError: see `encode_prompt`.
    """
    return len(encode_prompt(tokenizer, template, instruction, context, limit + 1))
