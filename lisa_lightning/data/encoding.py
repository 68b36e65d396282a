"""Rows to token ids and labels."""

from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.packing import IGNORED, Example
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import Template, encode_prompt
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.runtime.errors import UserError


def encode(tokenizer: PreTrainedTokenizerBase, template: Template, row: Row, max_length: int) -> Example:
    """Return prompt (not learnt), answer and end of text (learnt), cut at `max_length` tokens.

    Prompt and answer are tokenized separately and joined as ids, so that the label mask is exact. Of a long text only
    a prefix is tokenized.

    Args:
        tokenizer: of the model.
        template: the prompt's form.
        row: instruction, input and answer.
        max_length: tokens of the example at most.

    Returns:
        An example, whose `supervised` is 0 if the whole answer is cut off.

    Raises:
        UserError: The tokenizer has no end of text, or not the template.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError("This model's tokenizer has no end of text (eos_token), with which every answer must be learnt")
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
        tokenizer: of the model.
        template: the prompt's form.
        instruction: the request.
        context: its input, or "".
        limit: number up to which the result must be exact.

    Returns:
        The exact number if it is at most `limit`; otherwise some number above it.

    Raises:
        UserError: See `encode_prompt`.
    """
    return len(encode_prompt(tokenizer, template, instruction, context, limit + 1))
