"""The completion loss against the model's own `labels=` loss on the padded batch, on every family of models."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_lightning.config.settings import Lora
from lisa_lightning.data.packing import IGNORED, Example, pack, pad
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.hooks import attention_blocks, capture_outputs, mlp_blocks
from lisa_lightning.model.lora import attach, load
from lisa_lightning.objective.loss import choose_packing, completion_loss, unembed

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2}
SOFT_CAPS = {"head_dim": 8, "final_logit_softcapping": 5.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | SOFT_CAPS | {"attn_implementation": "eager"},
    "gemma3_text": GROUPED | {"head_dim": 8},
    # The second layer has no positions.
    "smollm3": GROUPED | {"no_rope_layer_interval": 2},
    "opt": {"dropout": 0.0, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "phi": {},
    "phi3": GROUPED,
    "granite": GROUPED | {"logits_scaling": 8.0},
    "cohere": GROUPED | {"logit_scale": 0.0625},
}
HEADS: dict[str, dict[str, Any]] = {"gpt2": {}, "mixtral": GROUPED | {"num_local_experts": 2}}
"""Families whose heads read more of the decoder's output than its hidden states."""


WINDOWS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0]},
}
"""Options with which a layer of a family has an attention window."""


def lora(dropout: float = 0.0) -> Lora:
    return Lora(r=4, alpha=8, dropout=dropout, targets="all-linear")


def bare(name: str, **changed: object) -> Any:
    """Return a tiny random model of a family."""
    torch.manual_seed(0)
    settings = SIZES | (FAMILIES | HEADS)[name] | changed
    attention = settings.pop("attn_implementation", "sdpa")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), attn_implementation=attention)


def family(name: str, **changed: object) -> Any:
    """Return a tiny random model of a family with an adapter that is not zero."""
    return stirred(attach(bare(name, **changed), lora(), seed=0))


def stirred(net: Any) -> Any:
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.normal_(std=0.1)
    return net


def example(prompt: str, answer: str, max_length: int = 256) -> Example:
    prefix, target = [3 + b for b in prompt.encode()], [3 + b for b in answer.encode()] + [0]
    labels = [IGNORED] * len(prefix) + target
    return Example(tuple((prefix + target)[:max_length]), tuple(labels[:max_length]))


BATCHES = {
    "shared prefix": [example("the same opening: " + x, y) for x, y in (("a b", "yes"), ("a c", "no"), ("zz", "yes"))],
    "mixed templates": [example("one", "x"), example("quite another beginning", "long answer"), example("o", "")],
    "one row": [example("alone", "here")],
    "one token": [example("", ""), example("p", "q")],
    "equal rows": [example("twice", "told")] * 2,
    "answer within another's prompt": [example("abcdef", "g"), example("abc", "defgh")],
    "no label left": [Example((5, 6, 7), (IGNORED,) * 3), example("a", "b")],
    "cut at the maximum length": [example("abcd", "efghij", 7), example("abcdefg", "h", 7), example("ab", "c", 7)],
}


def reference(net: torch.nn.Module, rows: list[Example]) -> tuple[Tensor, int]:
    """Return the loss as a Trainer computes it, and its number of labels.

    A Trainer pads, computes full logits, and takes the model's own loss (a mean).
    """
    ids = pad_sequence([torch.tensor(r.ids) for r in rows], batch_first=True, padding_value=1)
    labels = pad_sequence([torch.tensor(r.labels) for r in rows], batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones(len(r.ids), dtype=torch.long) for r in rows], batch_first=True)
    return net(input_ids=ids, attention_mask=mask, labels=labels).loss, int((labels[:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("name", [*FAMILIES, *HEADS])
def test_final_hidden_states_unembedded_are_the_models_logits(name: str) -> None:
    model = bare(name).eval()
    with torch.no_grad():
        found = model(torch.arange(3, 20)[None], output_hidden_states=True)
        (final,) = found.hidden_states[-1]
        assert torch.allclose(unembed(model, final), found.logits[0], atol=1e-5)
        cap = getattr(model.config, "final_logit_softcapping", None)
        own = 50 * final  # large enough for a soft cap to show
        assert cap is None or unembed(model, own).abs().max() <= cap < model.lm_head(own).abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_an_attention_block_and_an_mlp(name: str) -> None:
    model = family(name).get_base_model()
    ids = torch.arange(3, 20)[None]
    for find in (attention_blocks, mlp_blocks):
        with torch.no_grad(), capture_outputs(find(model)) as outputs:
            model(ids)
        assert [f.numel() for f in outputs] == [ids.numel() * SIZES["hidden_size"]] * SIZES["num_hidden_layers"]


def assert_equal_to_the_models_own(net: Any, rows: list[Example], together: Any) -> None:
    wanted, tokens = reference(net, rows)
    wanted.backward()
    gradients = {n: w.grad.clone() for n, w in trainable(net).items() if w.grad is not None}
    net.zero_grad()

    assert tokens == sum(r.supervised for r in rows)
    found = completion_loss(net.get_base_model(), together(rows)) / tokens
    found.backward()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    for n, w in trainable(net).items():
        assert w.grad is not None
        assert (w.grad - gradients[n]).norm() <= 1e-4 * gradients[n].norm() + 1e-8


@pytest.mark.parametrize("together", [pack, pad])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_models_own_loss(tiny: Path, batch: str, together: Any) -> None:
    net = stirred(attach(load(tiny, "float32"), lora(), seed=0))
    assert_equal_to_the_models_own(net, BATCHES[batch], together)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shares_prefixes(name: str) -> None:
    net = family(name)
    together = choose_packing(net.get_base_model(), max_length=64)
    assert together is pack
    assert net.training
    assert_equal_to_the_models_own(net, [e for rows in BATCHES.values() for e in rows], together)


def test_equal_dropout_masks_give_equal_losses(tiny: Path) -> None:
    """Packed and padded rows with equal dropout masks have equal losses.

    A mask is drawn for each token. Masks that depend on the position alone can be given to both forms.
    """
    net = stirred(attach(load(tiny, "float32"), lora(dropout=0.5), seed=0))
    masks = PositionMasks(net)
    rows = [e for rows in BATCHES.values() for e in rows]
    masks.positions = torch.arange(max(len(r.ids) for r in rows))
    wanted, tokens = reference(net, rows)
    found = torch.zeros(())
    for packed in pack(rows):
        assert packed.positions is not None
        masks.positions = packed.positions[0]
        found = found + completion_loss(net.get_base_model(), [packed]) / tokens
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    net.eval()
    assert (completion_loss(net.get_base_model(), pack(rows)) / tokens - wanted).abs() > 1e-3


class PositionMasks:
    """Dropout layers whose masks are a function of the layer and the token's position."""

    def __init__(self, net: Any) -> None:
        self.positions = torch.arange(0)
        for i, layer in enumerate(m for m in net.modules() if isinstance(m, torch.nn.Dropout)):
            layer.forward = partial(self._drop, net, i)  # type: ignore[method-assign]

    def _drop(self, net: Any, layer: int, x: Tensor) -> Tensor:
        drawn = torch.rand(64, x.shape[-1], generator=torch.Generator().manual_seed(layer)) < 0.5
        return x * drawn[self.positions] * 2 if net.training else x


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize("name", WINDOWS)
def test_a_short_sliding_window_takes_padded_rows(name: str, said: pytest.LogCaptureFixture) -> None:
    net = family(name, **WINDOWS[name], sliding_window=8)
    together = choose_packing(net.get_base_model(), max_length=64)
    assert together is pad
    assert said.text.count("attention window of 8 tokens") == 1
    assert_equal_to_the_models_own(net, [e for rows in BATCHES.values() for e in rows], together)
    changed = family(name, **WINDOWS[name], sliding_window=64)
    ids, mask = torch.arange(3, 20)[None], torch.ones(1, 17, dtype=torch.long)
    with torch.no_grad():
        assert not torch.allclose(net(ids, attention_mask=mask).logits, changed(ids, attention_mask=mask).logits)
    assert choose_packing(net.get_base_model(), max_length=9) is pad
    assert choose_packing(net.get_base_model(), max_length=8) is pack


def test_a_model_that_shares_no_prefixes_is_found_out(tiny: Path, said: pytest.LogCaptureFixture) -> None:
    """A model that counts positions itself gets padded rows: its positions are those of a lone row, wrong on a trie."""
    model = load(tiny, "float32")
    inner = model.model
    forward = inner.forward
    inner.forward = lambda position_ids=None, **given: forward(**given)
    assert choose_packing(model, max_length=64) is pad
    assert "% off" in said.text


def test_autocast_makes_no_difference_to_how_rows_are_packed(tiny: Path) -> None:
    model = load(tiny, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_packing(model, max_length=64) is pack


def test_logits_that_are_no_numbers_are_not_equal(tiny: Path, said: pytest.LogCaptureFixture) -> None:
    inner: Any = load(tiny, "float32")
    forward = inner.model.forward

    def spoilt(position_ids: Tensor | None = None, **given: Any) -> Any:
        output = forward(position_ids=position_ids, **given)
        if position_ids is not None:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    inner.model.forward = spoilt
    assert choose_packing(inner, max_length=64) is pad
    assert "nan % off" in said.text


def test_hooks_see_every_layer(tiny: Path) -> None:
    """Hooks on modules see every layer, so that a defense on hidden states needs no second forward pass."""
    model: Any = load(tiny, "float32")
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out))
    packs = pack(BATCHES["shared prefix"])
    completion_loss(model, packs)
    assert [hidden.shape for hidden in seen] == [(1, packs[0].ids.shape[1], 32)] * 2


def test_shared_prefixes_stand_once_and_what_predicts_nothing_not_at_all() -> None:
    rows = [Example((1, 2, 3, 4, 0), (IGNORED, IGNORED, IGNORED, 4, 0)), Example((1, 2, 5, 0), (IGNORED,) * 3 + (0,))]
    (packed,) = pack(rows)
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5]]
    assert packed.positions is not None
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.mask[0, 0, 4].tolist() == [True, True, False, False, True]
    assert packed.logit_positions.tolist() == [2, 3, 4]


def test_packs_stay_short_where_little_is_shared() -> None:
    rows = [example(f"{i}" * 120, "answer") for i in range(9)]
    packs = pack(rows)
    assert all(p.ids.shape[1] <= 400 for p in packs)
    assert sum(len(p.targets) for p in packs) == sum(r.supervised for r in rows)


@pytest.mark.parametrize("together", [pack, pad])
def test_nothing_to_learn_gives_no_pack(together: Any) -> None:
    assert together([Example((5, 6), (IGNORED, IGNORED)), Example((5,), (5,))]) == []


def test_a_pack_tells_how_many_rows_a_token_stands_for_and_each_targets_place() -> None:
    rows = [Example((1, 2, 3, 4), (IGNORED, IGNORED, 3, 4)), Example((1, 2, 5, 6), (IGNORED, IGNORED, 5, 6))]
    (trie,), (padded,) = pack(rows), pad(rows)
    assert dict(zip(trie.ids[0].tolist(), trie.row_count[0].tolist(), strict=True)) == {1: 2, 2: 2, 3: 1, 5: 1}
    assert sorted(zip(trie.targets.tolist(), trie.label_index.tolist(), strict=True)) == [
        (3, 0),
        (4, 1),
        (5, 0),
        (6, 1),
    ]
    assert padded.label_index.tolist() == [0, 1, 0, 1]
