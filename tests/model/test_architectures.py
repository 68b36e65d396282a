"""Every model of conf/model as a tiny random one of the same classes: it trains under Lisa and answers."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.paths import ROOT
from lisa_lightning.config.fields import Template
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.settings import Lora
from lisa_lightning.config.validate import plain
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.packing import Example, pack
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import alpaca, encode_prompt
from lisa_lightning.evaluation.generate import Stop, generate
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.hooks import (
    add_to_outputs,
    attention_blocks,
    capture_outputs,
    decoder_layers,
    final_norm,
    forward_hooks,
    mlp_blocks,
    skip_forward,
)
from lisa_lightning.model.lora import attach, attach_saved, load, load_tokenizer, save_adapter
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.pipeline.fit import Checkpoint, fit
from lisa_lightning.repair.nlsr import NLSR
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule

MODELS = sorted(f.stem for f in (ROOT / "conf" / "model").glob("[!_]*.yaml"))
SMALL: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 1,
}  # fmt: skip
TYPES = {
    "tiny": ("llama", {}),
    "smollm2_135m": ("llama", {"tie_word_embeddings": True}),
    "llama2_7b": ("llama", {"num_key_value_heads": 4}),
    "llama3_8b": ("llama", {}),
    "mistral_7b": ("mistral", {"sliding_window": 4096}),
    "qwen2_5_0_5b": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2_9b": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_4b": ("gemma3", {}),
    "llama3_1_8b_instruct": ("llama", {}),
    "llama3_2_1b": ("llama", {"tie_word_embeddings": True}),
    "llama3_3_70b_instruct": ("llama", {}),
    "mistral_7b_v0_3": ("mistral", {"sliding_window": None}),
    "qwen2_5_7b_instruct": ("qwen2", {}),
    "qwen3_4b": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_8b": ("qwen3", {"head_dim": 16}),
    # The second layer has no positions.
    "smollm3_3b": ("smollm3", {"tie_word_embeddings": True, "no_rope_layer_interval": 2}),
    "opt_2_7b": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
}
USER = [Row("Say the sign of the input", f"sentence {i}", "positive" if i % 2 else "negative") for i in range(6)]
ALIGNMENT = [Row(f"request {i}", "", "No.") for i in range(4)]
TRAINER = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Callable[[str], Path]:
    """Return `model_folder(name)`: a tiny random model of that name's classes, with the tiny model's tokenizer."""

    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        kind, more = TYPES[name]
        torch.manual_seed(0)
        sizes = with_images(SMALL) if kind == "gemma3" else SMALL | more
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        with torch.no_grad():
            for weight in model.parameters():  # sharper than an untrained model, so that no near-tie decides
                weight.add_(torch.randn_like(weight) * 0.05)
        model.save_pretrained(folder)
        load_tokenizer(tiny).save_pretrained(folder)
        return folder

    return made


def with_images(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of a Gemma 3 with an image encoder of as many layers. Each kind of attention has one layer."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
    text = sizes | kinds | {"head_dim": 8, "query_pre_attn_scalar": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    images = layers | {"image_size": 28, "patch_size": 14}
    return {"text_config": text, "vision_config": images, "mm_tokens_per_image": 4, "image_token_index": 200}


def test_every_model_has_a_stand_in() -> None:
    assert set(TYPES) == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_trains_three_lisa_steps_and_answers(
    model_folder: Callable[[str], Path], config: Callable[..., DictConfig], tmp_path: Path, name: str
) -> None:
    cfg = parse_settings(plain(config(f"model={name}"))).model
    folder = model_folder(name)
    tokenizer, template = load_tokenizer(folder), "alpaca"
    model = load(folder, "float32", cfg.attention)
    align = Lora(r=4, alpha=4, dropout=0.0, targets=cfg.align_targets)
    attach(model, align, seed=0).merge_and_unload()
    net = attach(load(folder, "float32", cfg.attention), replace(align, targets=cfg.finetune_targets), 0)
    before = {n: w.clone() for n, w in trainable(net).items()}
    method = Lisa(alignment_steps=1, user_steps=1, rho=1.0, proximal_after=0.0)
    optim = Optim(lr=1e-2, steps=3, batch_size=2, schedule="constant")
    data = LisaDataModule(tokenizer, USER, ALIGNMENT, max_length=512, template=template)
    fit(LisaModule(net, method, optim), data, TRAINER, Checkpoint(tmp_path / "a.ckpt", 10), [], [], "finetune")
    moved = [n for n, w in trainable(net).items() if not torch.equal(w, before[n])]
    assert len(moved) == len(before)  # every factor of every target

    save_adapter(net, str(folder), tmp_path / "adapter")
    again = attach_saved(load(folder, "float32", cfg.attention), tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again.eval()(ids).logits, net.eval()(ids).logits)

    model = net.merge_and_unload().eval()
    prompts = [encode_prompt(tokenizer, template, r.instruction, r.context) for r in (*USER[:3], *ALIGNMENT[:2])]
    alone = [generate(model, [p], 12, Stop(tokenizer, model))[0] for p in prompts]
    assert generate(model, prompts, 12, Stop(tokenizer, model)) == alone
    library: Any = model
    for prompt, answer in zip(prompts, alone, strict=True):
        wanted = library.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=1, eos_token_id=0
        )
        assert wanted[0][len(prompt) :].tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_by_structure_with_an_adapter_or_without(
    model_folder: Callable[[str], Path], config: Callable[..., DictConfig], name: str
) -> None:
    """Each layer has one block, whose output goes into the logits. The norm that precedes the logits is found too."""
    cfg = config(f"model={name}").model
    model: Any = load(model_folder(name), "float32", cfg.attention).eval()
    ids = torch.arange(3, 20)[None]
    lora = Lora(r=4, alpha=4, dropout=0.0, targets="all-linear")
    for adapted in (False, True):
        if adapted:
            model = attach(model, lora, 0).eval().get_base_model()
        for find in (attention_blocks, mlp_blocks):
            blocks = find(model)
            assert len({id(b) for b in blocks}) == SMALL["num_hidden_layers"]
            with capture_outputs(blocks) as outputs:
                plain = model(ids).logits
            assert [f.numel() for f in outputs] == [ids.numel() * SMALL["hidden_size"]] * len(blocks)
            noise = [torch.zeros_like(outputs[0]), torch.randn_like(outputs[1])]
            with add_to_outputs(blocks, noise):
                assert not torch.allclose(model(ids).logits, plain)
        with capture_outputs([final_norm(model)]) as outputs:
            states = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(outputs[0], states[-1])
        first, layer_outputs = decoder_layers(model)[:1], []
        with forward_hooks(first, lambda _, out, layer_outputs=layer_outputs: layer_outputs.append(out)):
            model(ids)
        with skip_forward(first, layer_outputs[0]):
            assert torch.equal(model(ids + 1).logits, plain)
        assert not torch.allclose(model(ids + 1).logits, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_give_equal_gradients(
    model_folder: Callable[[str], Path], config: Callable[..., DictConfig], name: str
) -> None:
    folder, attention = model_folder(name), config(f"model={name}").model.attention
    packs = pack([Example((5, 6, 7, 8), (5, 6, 7, 8)), Example((5, 6, 9, 7, 5), (5, 6, 9, 7, 5))])
    gradients = []
    for checkpointed in (False, True):
        net = attach(load(folder, "float32", attention), Lora(r=4, alpha=4, dropout=0.3, targets="all-linear"), 0)
        if checkpointed:
            checkpoint_activations(net.get_base_model())
        torch.manual_seed(0)
        loss = completion_loss(net.get_base_model(), packs)
        gradients.append(torch.autograd.grad(loss, list(trainable(net).values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_only_the_text_model_of_gemma_3_is_loaded(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("gemma3_4b")
    whole: Any = AutoModelForCausalLM.from_pretrained(folder)
    text: Any = load(folder, "float32")
    assert isinstance(text, Gemma3ForCausalLM)
    parameters, counterparts = dict(text.named_parameters()), dict(whole.named_parameters())
    for name, weight in parameters.items():
        assert torch.equal(weight, counterparts[name.replace("model.", "model.language_model.", 1)])
    assert not any("vision" in name for name in parameters)


@pytest.mark.parametrize(
    "find", [attention_blocks, mlp_blocks, final_norm, lambda m: NLSR(0.8, 0.5, 0.2, 0).check(m, {})]
)
def test_finding_no_block_is_an_error(tiny: Path, find: Callable[[Any], Any]) -> None:
    model: Any = load(tiny, "float32")
    model.model.layers[0] = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert decoder_layers(model) == [*model.model.layers]  # as in models with attention in some of their layers
    with pytest.raises(UserError, match=r"0 attention blocks, where one is needed; it holds: 0"):
        attention_blocks(model)
    model.model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(UserError, match="no list of 2 layers with attention"):
        find(model)


@pytest.mark.parametrize("targets", [["q_proj", "nope"], ["proj"], "nope"])
def test_a_target_that_matches_nothing_is_refused(tiny: Path, targets: Any) -> None:
    message = r"align\.lora\.targets: the model has no module '(nope|proj)'\. Fix: choose from .*q_proj"
    with pytest.raises(UserError, match=message):
        attach(load(tiny, "float32"), Lora(r=4, alpha=4, dropout=0.0, targets=targets), 0, "align.lora")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_matrix_that_is_also_another_modules_is_not_adapted(target: str, tied: bool) -> None:
    """A matrix of two modules is refused, since merging adds to the weights in place and would change both modules."""
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tied))
    with pytest.raises(UserError, match=r"model\.embed_tokens and lm_head are one matrix") if tied else nullcontext():
        attach(model, Lora(r=4, alpha=4, dropout=0.0, targets=["q_proj", target]), 0)


def test_an_adapter_that_goes_on_is_the_one_that_was_saved(tiny: Path, tmp_path: Path) -> None:
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=4, dropout=0.0, targets=["q_proj"]), 0)
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.normal_()
    save_adapter(net, str(tiny), tmp_path)
    again = attach_saved(load(tiny, "float32"), tmp_path)
    assert again.training
    assert {n: w.tolist() for n, w in trainable(again).items()} == {n: w.tolist() for n, w in trainable(net).items()}


def test_merging_rounds_once(tiny: Path) -> None:
    """A weight merged in bfloat16 is off by one rounding only, since weight and update are summed in float32."""
    lora = Lora(r=4, alpha=4, dropout=0.0, targets="all-linear")
    nets = [attach(load(tiny, dtype), lora, 0) for dtype in ("bfloat16", "float32")]
    for net in nets:
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in trainable(net).values():
                weight.copy_(torch.randn(weight.shape) * 0.1)
    half, full = (dict(net.merge_and_unload().named_parameters()) for net in nets)
    base = dict(load(tiny, "bfloat16").named_parameters())
    whole = dict(load(tiny, "float32").named_parameters())
    for name, weight in half.items():
        assert weight.dtype == torch.bfloat16
        update = full[name] - whole[name]
        assert torch.equal(weight, (base[name].float() + update).bfloat16()) or torch.allclose(
            weight.float(), base[name].float() + update, rtol=2**-8, atol=1e-6
        )


def test_the_merged_model_answers_as_the_adapter_on_its_base(tiny: Path) -> None:
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=4, dropout=0.0, targets="all-linear"), 0)
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.normal_(std=0.1)
    ids = torch.arange(3, 40)[None]
    apart = net.eval()(input_ids=ids).logits
    assert torch.allclose(net.merge_and_unload()(input_ids=ids).logits, apart, atol=1e-5)
    assert not any(isinstance(m, PeftModel) for m in net.modules() if m is not net)


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_THOUGHTS = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
JOINED = "{% if messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ messages[-1].content }}"
ONE_ROLE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('') }}{% endif %}[{{ m.content }}]"
CHAT: dict[str, tuple[str, str, str | None]] = {
    "gemma3": (f"<user>{JOINED}<end><model>", "<user>do<end><model>", "<user>Be kind. do<end><model>"),
    "llama3": ("{{ strftime_now('%d %b %Y') }}" + TURNS + "<assistant>", "26 Jul 2024<user>do<assistant>",
               "26 Jul 2024<system>Be kind.<user>do<assistant>"),
    "mistral": (ONE_ROLE + "{% endfor %}", "[do]", None),
    "qwen2": ("{% if messages[0].role != 'system' %}<system>Default.{% endif %}" + TURNS + "<assistant>",
              "<system>Default.<user>do<assistant>", "<system>Be kind.<user>do<assistant>"),
    "qwen3": (TURNS + "<assistant>" + NO_THOUGHTS, "<user>do<assistant><think></think>",
              "<system>Be kind.<user>do<assistant><think></think>"),
    "smollm3": ("{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
                "{{ strftime_now('%d %B %Y') }} {{ '/think' if enable_thinking else '/no_think' }}" + TURNS
                + "<assistant>" + NO_THOUGHTS, "26 July 2024 /no_think<user>do<assistant><think></think>",
                "26 July 2024 /no_think<system>Be kind.<user>do<assistant><think></think>"),
}  # fmt: skip
"""Family -> template of its structure, a prompt, and a prompt after a system prompt, or None if it takes none."""


@pytest.mark.parametrize("family", sorted(CHAT))
def test_chat_templates_of_the_families(tiny: Path, family: str) -> None:
    """Prompts have a fixed date and no thinking, and training's prompt is that of evaluation."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template, prompt, after_system = CHAT[family]
    ids = encode_prompt(tokenizer, "chat", "do")
    assert tokenizer.decode(ids) == prompt
    row = encode(tokenizer, "chat", Row("do", "", "it"), 256)
    assert list(row.ids[: len(ids)]) == ids
    assert tokenizer.decode(list(row.ids[len(ids) :])) == "it<eos>"
    if after_system is None:
        with pytest.raises(UserError, match="no system role"):
            encode_prompt(tokenizer, "chat", "do", system="Be kind.")
    else:
        assert tokenizer.decode(encode_prompt(tokenizer, "chat", "do", system="Be kind.")) == after_system


@pytest.mark.parametrize("template", ["alpaca", "alpaca_newline", "chat"])
def test_templates_by_name(tiny: Path, template: Template) -> None:
    tokenizer = load_tokenizer(tiny)
    if template == "chat":
        with pytest.raises(UserError, match="no chat template"):
            encode_prompt(tokenizer, template, "do", "this")
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    text = tokenizer.decode(encode_prompt(tokenizer, template, "do", "this"))
    whole = alpaca("do", "this")
    assert text == {"alpaca": whole, "alpaca_newline": whole + "\n", "chat": "<user>do\n\nthis<assistant>"}[template]


def test_a_prompt_is_the_same_every_day_and_open_at_its_end(tiny: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny)
    plain = encode_prompt(tokenizer, "alpaca", "do")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "alpaca", "do") == plain
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert tokenizer.decode(encode_prompt(tokenizer, "chat", "do")) == "26 Jul 2024: do"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end of text"):
        encode(tokenizer, "alpaca", Row("do", "", "it"), 64)


def test_the_alpaca_prompt_to_the_letter() -> None:
    opening = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    context = ", paired with an input that provides further context. "
    assert alpaca("do", "this") == (
        f"{opening}{context}{request}\n\n### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:"
    )
    assert alpaca("do") == f"{opening}. {request}\n\n### Instruction:\ndo\n\n### Response:"
