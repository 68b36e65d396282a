"""Laws of every training-time method on the tiny model: methods that it equals, splits of a step, and resumption."""

import math
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from helpers import ranks, training
from helpers.forking import Forked
from helpers.methods import ALIKE, FULL, METHODS, each
from helpers.recording import Recording
from helpers.training import DEFENDER, STEPS, Train, largest_difference
from lisa_lightning.align.lox import LoX
from lisa_lightning.align.repnoise import RepNoise, _differing_positions, mmd
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.config.settings import Lora
from lisa_lightning.data import packing
from lisa_lightning.data.packing import Example, pad
from lisa_lightning.data.schedule import StreamBatch
from lisa_lightning.data.source import Row
from lisa_lightning.method.constrained_sft import ConstrainedSFT
from lisa_lightning.method.ldifs import LDIFS
from lisa_lightning.method.sbr import SBR
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.vlguard_loss import VLGuardLoss
from lisa_lightning.model.hooks import capture_outputs, final_norm, mlp_blocks
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.repair._dpo import DPO
from lisa_lightning.trainer.module import LisaModule, _mix

QUICK = ("lisa",)


@pytest.mark.parametrize("name", each(ALIKE, QUICK))
def test_without_its_term_a_method_is_what_it_builds_on_bit_for_bit(train: Train, name: str) -> None:
    """A method without its term equals the method that it builds on, also after a resumption.

    Both run with dropout, micro-batches and a clip that binds.
    """
    method, builds_on = ALIKE[name]
    trained = partial(train, dropout=0.2, steps=8, batch_size=2, accumulate=2, clip=0.05)
    other = trained(builds_on, folder="other", apart="alignment" in method.unpacked_streams)
    with pytest.raises(InterruptedError):
        trained(method, folder="without", stop_after=5)
    assert largest_difference(trained(method, folder="without"), other) == 0
    assert largest_difference(trained(METHODS[name](), folder="with"), other) > 1e-4
    assert largest_difference(trained(builds_on, folder="unclipped", clip=None), other) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_so_if_it_uses_defender_rows(name: str) -> None:
    method = METHODS[name]()
    draws = any("defender" in method.plan(step) for step in range(9))
    assert (draws or isinstance(method, SBR)) == ("defender_rows" in method.requirements)  # which reads the first ones


def test_vlguard_as_a_loss_draws_as_many_alignment_rows_as_it_is_told() -> None:
    assert VLGuardLoss(1.0, 3).plan(7) == {"user": StreamBatch(7), "alignment": StreamBatch(7, 3)}


@pytest.mark.slow
def test_constrained_sft_is_sft_at_the_weights_that_it_starts_from(train: Train) -> None:
    method = METHODS["constrained_sft"]
    for split in ({}, {"batch_size": 2, "accumulate": 2}, {"clip": 0.05}):
        one, plain = (train(m, 0.2, folder=str((m, split)), steps=1, **split) for m in (method(), SFT()))
        assert largest_difference(one, plain) < 1e-6
    plain = train(SFT(), folder="c", steps=8)
    assert largest_difference(train(method(), folder="d", steps=8), plain) > 1e-4
    assert largest_difference(train(ConstrainedSFT(0.0, 5.0, 20.0, 5), folder="e", steps=8), plain) < 5e-6


@pytest.mark.slow
def test_dpo_starts_at_log_two_and_prefers_the_refusals_afterwards(train: Train) -> None:
    seen = Recording()
    train(DPO(0.5), steps=12, loggers=[seen], weight_decay=0.0)
    assert seen.values()[0] == pytest.approx(math.log(2), abs=1e-5)
    assert max(seen.values()[-3:]) < 0.5


def test_every_step_draws_dropout_masks_of_its_own(train: Train) -> None:
    seeds = _Seeds()
    train(SFT(), 0.5, steps=6, more=[seeds])
    assert len(set(seeds.seen)) == 6
    assert _mix(1, 2, 0) != _mix(1, 2, 1)  # and every rank


class _Seeds(L.Callback):
    """Callback that keeps the seed from which every step's masks are drawn."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object, **__: object) -> None:
        assert isinstance(pl_module, LisaModule)
        self.seen.append(pl_module.backprop.seed)


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_batch_four_is_two_micro_batches_of_two(train: Train, name: str) -> None:
    steps, bound = (STEPS, 5e-6) if name in ("sft", "lisa") else (6, 5e-5)
    whole = train(METHODS[name](), folder="a", steps=steps)
    halves = train(METHODS[name](), folder="b", steps=steps, batch_size=2, accumulate=2)
    assert largest_difference(whole, halves) < bound


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_resume_equals_the_straight_run_bit_for_bit_with_dropout(train: Train, name: str) -> None:
    straight = train(METHODS[name](), 0.2, folder="straight", steps=7)
    with pytest.raises(InterruptedError):
        train(METHODS[name](), 0.2, folder="broken", steps=7, stop_after=5)
    assert largest_difference(straight, train(METHODS[name](), 0.2, folder="broken", steps=7)) == 0


def test_with_dropout_the_pass_of_the_reference_draws_the_masks_of_the_models_own(train: Train) -> None:
    """The pass of the reference draws the masks of the model's own pass.

    The first step, in which nothing has moved yet, thus has unchanged features for LDIFS and no gain for DPO.
    """
    seen = Recording()
    train(LDIFS(0.1, None, None, False), 0.3, folder="ldifs", steps=1, loggers=[seen])
    assert seen.values("ldifs/penalty") == [0]
    seen = Recording()
    train(DPO(0.5), 0.3, folder="dpo", steps=1, batch_size=2, accumulate=2, loggers=[seen])
    assert seen.values()[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_padded_rows_one_trie_or_many_are_the_same(train: Train, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen = {folder: Recording() for folder in ("one", "padded", "many")}

    def trained(folder: str, apart: bool = False) -> LisaModule:
        return train(METHODS[name](), folder=folder, steps=6, apart=apart, loggers=[seen[folder]])

    one, padded = trained("one"), trained("padded", apart=True)
    monkeypatch.setattr("lisa_lightning.trainer.module.choose_packing", lambda *_: packing.pack)
    monkeypatch.setattr(packing, "MAX_PACK_TOKENS", 0)
    for folder, other in (("padded", padded), ("many", trained("many"))):
        assert largest_difference(one, other) < 5e-5
        for own, others in zip(seen["one"].steps, seen[folder].steps, strict=True):
            assert own == pytest.approx(others, rel=1e-3, abs=1e-5)


def test_repnoise_is_what_the_models_own_passes_say(train: Train, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = RepNoise(0.1, 0.5, False, 0)
    monkeypatch.setattr(RepNoise, "noise", lambda self, step, layer, shape: torch.zeros(*shape))
    seen = Recording()
    module = train(method, steps=1, batch_size=len(DEFENDER), lr=1e-12, loggers=[seen])
    model, tokenizer = module.backprop.model, load_tokenizer(tiny)
    activations, entropies = [], []
    for row in DEFENDER:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row.instruction, row.response)
        )
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad(), capture_outputs(mlp_blocks(model)) as outputs:
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        activations.append([f[0, len(prompt) : -1] for f in outputs])
        norm = final_norm(model)
        logits = torch.stack([model.lm_head(h[0, len(prompt) - 1 : -1]) for h in (*map(norm, states[:-1]), states[-1])])
        expected = ids[0, len(prompt) :].expand(len(logits), -1)
        entropies.append(F.cross_entropy(logits.transpose(1, 2), expected, reduction="none").mean(0))
    assert seen.values("repnoise/entropy")[0] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    layers = [pad_sequence(list(layer), batch_first=True).flatten(1) for layer in zip(*activations, strict=True)]
    distances = torch.stack([mmd(layer, torch.zeros_like(layer)) for layer in layers])
    assert seen.values("repnoise/mmd")[0] == pytest.approx(float(distances.mean()), rel=1e-5)


def test_a_rounded_id_behind_the_vocabulary_is_no_label_of_official_repnoise() -> None:
    rows = pad([Example((5, 300, 511), (-100, 300, 511))])  # 511 is 512 in bfloat16
    for vocabulary, labels in ((513, [300, 512]), (512, [300])):
        assert _differing_positions(rows[0], torch.zeros(1, 3), True, vocabulary).targets.tolist() == labels


def test_moved_weights_count_though_autocast_keeps_the_casts_of_those_before(tiny: Path) -> None:
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    backprop, ids = Backprop(net, lambda *_: iter(())), torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        before = net(input_ids=ids).logits
        with backprop.swapped_weights([torch.ones_like(w) for w in backprop.weights]):
            assert not torch.equal(net(input_ids=ids).logits, before)
        assert torch.equal(net(input_ids=ids).logits, before)


@pytest.mark.slow
def test_booster_adding_back_leaves_the_rounding_of_the_harmful_step(train: Train) -> None:
    exact, rounded = (train(METHODS[name](), folder=name, steps=4) for name in ("booster", "booster_adding_back"))
    assert 0 < largest_difference(exact, rounded) < 1e-3


@pytest.mark.slow
def test_the_inner_clip_of_ldifs_is_that_of_the_optimizer(train: Train) -> None:
    """The inner clip of LDIFS equals that of the optimizer, with an epsilon at which a gradient's length counts."""
    own = train(LDIFS(0.1, None, 1e-3, False), folder="own", steps=4, clip=None, eps=1.0)
    common = train(LDIFS(0.1, None, None, False), folder="common", steps=4, clip=1e-3, eps=1.0)
    neither = train(LDIFS(0.1, None, None, False), folder="neither", steps=4, clip=None, eps=1.0)
    assert largest_difference(own, common) < 1e-8 < largest_difference(own, neither)


@pytest.mark.parametrize("cut_off", ["ALIGNMENT", "DEFENDER"])
def test_official_repnoise_compares_with_nothing_where_all_other_answers_are_cut_off(
    train: Train, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    monkeypatch.setattr(training, cut_off, [Row("a prompt that leaves no room for its answer " * 2, "", "no")] * 5)
    module = train(RepNoise(0.1, 50.0, True, 0), steps=2)
    assert all(w.isfinite().all() for w in module.weights)


@pytest.mark.parametrize(("rows", "rank", "columns"), [(9, 4, 7), (3, 5, 8), (8, 5, 3), (6, 6, 6)])
@pytest.mark.parametrize("k", [1, 3, None])
def test_lox_adds_the_leading_directions_of_the_update(rows: int, rank: int, columns: int, k: int | None) -> None:
    generator = torch.Generator().manual_seed(rows)
    name = "base_model.model.layer.lora_{}.default.weight"
    factors = {
        name.format("A"): torch.randn(rank, columns, generator=generator),
        name.format("B"): torch.randn(rows, rank, generator=generator),
    }
    update = factors[name.format("B")].double() @ factors[name.format("A")].double()
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    expected = update + 0.7 * u[:, :k] * s[:k] @ vh[:k]
    for same_k in (k, 99) if k is None else (k,):
        finished = LoX(same_k, 0.7).finish(factors, {})
        assert finished[name.format("A")] is factors[name.format("A")]
        product = finished[name.format("B")].double() @ factors[name.format("A")].double()
        torch.testing.assert_close(product, expected, atol=1e-5, rtol=0)
    assert LoX(k, 0.0).finish(factors, {}) is factors


def test_inactive_layers_stand_still_and_their_moments_too(train: Train) -> None:
    module = train(TVaccine(2.0, 1, 100, 100, 0), steps=3)
    optimizer: torch.optim.Optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    stepped = {name for name, w in zip(module.backprop.names, module.weights, strict=True) if w in optimizer.state}
    (active,) = module.state["active"][0].tolist()
    for name in module.backprop.names:
        layer = int(name.split(".layers.")[1].split(".")[0])
        assert (name in stepped) == (layer == active if ".self_attn." in name else layer >= active)


@pytest.mark.slow
def test_two_ranks_equal_one_that_has_their_rows_and_laws_hold_on_them(
    tiny: Path, tmp_path: Path, forked: Forked
) -> None:
    arguments = [str(tiny), str(tmp_path / "two.pt")]
    processes = [forked.start([*arguments, str(rank), "2"], tmp_path, {}, "helpers.ranks") for rank in range(2)]
    for done in map(forked.wait, processes):
        assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, make in METHODS.items():
        one = ranks.steps(make(), tiny, 0, 1)
        torch.testing.assert_close(one, two[name], atol=1e-5, rtol=0, msg=name)
    for name in FULL:
        one = ranks.steps(METHODS[name](), tiny, 0, 1, full=True)
        torch.testing.assert_close(one, two[f"{name} on all weights"], atol=1e-5, rtol=0, msg=f"{name}, all weights")
    for name in ALIKE:
        without, builds_on = two[f"{name} without its term"], two[f"what {name} builds on"]
        assert all(torch.equal(a, b) for a, b in zip(without, builds_on, strict=True)), name
    for name in METHODS:  # gathering shards computes nothing, and fillers draw no dropout mask
        for way in ranks.WAYS:
            pairs = zip(two[f"{name}, dropping"], two[f"{name}, {way}"], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (name, way)
    (one, _), (other, _) = ranks.selections(tiny, 1), two["selections"]
    assert one[one > 0].std() > 1e-3
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(two["selections"], two["selections, sharded"], strict=True))
    assert two["loss scale after an overflow on the other rank"][0] == 1
    torch.testing.assert_close(two["constrained_sft at its reference"], two["what it is then"], atol=1e-6, rtol=0)
