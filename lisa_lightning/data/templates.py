"""The Alpaca prompt, exactly as the papers use it: nothing follows `### Response:`."""

MARKER = "### Response:"


def alpaca(instruction: str, context: str = "") -> str:
    """The prompt for an instruction, with or without an input (Lisa's and Vaccine's form)."""
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n{MARKER}"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{MARKER}"
    )
