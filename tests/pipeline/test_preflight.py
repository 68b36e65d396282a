"""Settings that don't fit the model are refused at once, not when stages are done, and leave no folder behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from helpers.composing import composed
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError

MISFITS = {
    "repair=safe_lora repair.number=99": r"repair\.number=99: alignment changed only 4 of",
    "method=salora": r"method\.safety_rank=32: model\.layers\.0\.self_attn\.q_proj has 32 outputs, .* or less",
    "method=salora model.adapters=continued": r"method=salora: needs a separate adapter on the aligned model\. Fix: ",
    "method=salora method.safety_rank=8 repair=nlsr": r"method=salora: saves an adapter of another rank .* repair=nlsr",
    "method=sppft method.end=15": r"method\.end=15: the model has 2 layers\. Fix: method\.end=2 or less",
    "align=t_vaccine": r"align\.method\.active_layers=8 is not allowed; the model has 2",
    "align.lora.targets=[q_proj] lora.targets=[v_proj] method=asft": r"are fine-tuned \(v_proj\); it changed q_proj",
    "align.lora.targets=[q_proj] lora.targets=[v_proj] repair=safe_lora": r"are fine-tuned \(v_proj\)",
    "align=repnoise align.method.official=true align.optim.accumulate=2": r"accumulate=1 \(now 2\) and one process",
    "align=tar align.method.all_positions=true align.optim.batch_size=4": r"Fix: align\.optim\.batch_size=8 or more",
    "align=tar align.method.all_positions=true align.optim.accumulate=2": r"Fix: align\.optim\.accumulate=1 \(now 2\)",
    "method=ldifs method.padding=true optim.accumulate=2": r"Fix: optim\.accumulate=1 \(now 2\) and one process",
    "method=kl method.over=positions optim.accumulate=2": r"Fix: optim\.accumulate=1 \(now 2\) and one process",
    "lora.targets=[nope]": r"lora\.targets: the model has no module 'nope'",
    "lora.r=5000": r"lora\.r=5000 is above the rank of every adapted matrix\. Fix: lora\.r=32 or less",
    "align.lora.r=5000": r"align\.lora\.r=5000 is above the rank of every adapted matrix",
    "model.attention=flash_attention_2": r"The model in .* can't be loaded: ",
    "data.max_length=1025": r"data\.max_length=1025 is more than the 1024 positions of the model in",
    "data.max_length=20": r"cuts off the whole answer of all 60 user rows, whose shortest prompt takes \d+ tokens",
    "evaluate.max_new_tokens=1024": r"source\.harmful_prompts, prompt 1 of the evaluation: it takes \d+ tokens and its",
    "task.max_new_tokens=2000": r"source\.test, prompt 1 .* more than the 1024 positions",
    "trainer.precision=16-mixed": r"float16 needs a GPU, .* Fix: trainer\.precision=bf16-mixed or 32-true",
    "model.template=chat": r"^model\.template=chat: this tokenizer has no chat template",
    "evaluate.template=chat": r"^evaluate\.template=chat: this tokenizer has no chat template\. Fix: evaluate",
    f"evaluate.prefix={'x' * 900}": r"prompt 1 of the evaluation: it takes .* shorten its system prompt and prefix",
    f"evaluate.system={'x' * 900}": r"prompt 1 of the evaluation: it takes .* shorten its system prompt and prefix",
    "method=backdoor_align method.trigger_letters=350": r"of all 7 marked rows, whose shortest prompt takes \d+ tokens",
    "method=backdoor_align method.trigger_file=nowhere": r"method\.trigger_file=nowhere: can't be read \(No such file",
    "model.template=chat stages=[evaluate]": r"this tokenizer has no chat template",
}


def refused(words: list[str], work: Path, match: str | None = None) -> str:
    cache = work / "cache"
    request = composed(["experiment=smoke", f"cache_dir={cache}", *words], work / "out")
    with pytest.raises(UserError, match=match) as error:
        run(request)
    assert {folder.name for folder in cache.glob("*")} <= {"models"}
    assert not [*(work / "out").iterdir()]
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("words", MISFITS)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_trained(tmp_path: Path, words: str) -> None:
    refused(words.split(), tmp_path, match=MISFITS[words])


@pytest.fixture
def learned_positions(tiny: Path, tmp_path: Path) -> Path:
    """Return a model with 300 learned positions, beyond which it has no embeddings.

    A longer prompt would be an index error in the middle of a run.
    """
    folder = tmp_path / "gpt2"
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 300}
    GPT2LMHeadModel(GPT2Config(vocab_size=259, bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def of(model: Path) -> list[str]:
    return [f"model.id={model}", "lora.targets=[c_attn]", "align.lora.targets=[c_attn]"]


@pytest.mark.slow
def test_a_prompt_beyond_learned_positions_is_named(learned_positions: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "short"}, {"prompt": "x" * 300}, {"prompt": "x" * 10_000_000}]
    for row in rows[1:]:
        prompts.write_text("".join(json.dumps(r) + "\n" for r in (rows[0], row)))
        asked = [f"source.harmful_prompts.path={prompts}", "source.harmful_prompts.take=null", "data.max_length=300"]
        message = refused([*of(learned_positions), *asked], tmp_path)
        assert "source.harmful_prompts, prompt 2 of the evaluation: it takes more than 300 tokens" in message
    assert "data.max_length=301 is more than the 300 positions" in refused(
        [*of(learned_positions), "data.max_length=301"], tmp_path
    )


def test_a_tokenizer_that_is_larger_than_the_embeddings_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(model)
    message = refused([f"model.id={model}"], tmp_path)
    assert "has 261 tokens, and the model embeddings for 259. Fix: model.resize_token_embeddings" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Conversation roles must begin with system') }}", "must begin with system"),
        ("{% if messages %}", "fails"),
        ("{{ messages[0]['content'] + 5 }}", "fails"),
    ],
)
def test_a_chat_template_that_fails_is_quoted(tiny: Path, tmp_path: Path, template: str, words: str) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    for stages in ([], ["stages=[evaluate]"]):
        message = refused([f"model.id={model}", "model.template=chat", *stages], tmp_path)
        assert "model.template=chat: the tokenizer's chat template fails" in message
        assert words in message


@pytest.mark.slow
@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_next_to_a_models_weights_is_refused(tiny: Path, tmp_path: Path, weights: bool) -> None:
    """An adapter next to a model's weights is refused, as it would be applied to them, perhaps a second time.

    An adapter alone is no model.
    """
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    if not weights:
        (model / "model.safetensors").unlink()
    expected = "it holds a model's weights and adapter_config.json" if weights else "it holds an adapter, not a model"
    for stages in ([], ["stages=[evaluate]"]):
        message = refused([f"model.id={model}", *stages], tmp_path)
        assert expected in message
        assert "Fix: " in message
