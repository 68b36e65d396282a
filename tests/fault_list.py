"""The faults that tests/faults.py puts into the code: a piece of a file, what takes its place, who should see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is put in the place of what, and the tests that should see it."""

    file: str
    """Below lisa_lightning."""
    old: str
    new: str
    tests: str


def _faults(file: str, tests: str, *pairs: tuple[str, str]) -> list[Fault]:
    return [Fault(file, old, new, tests) for old, new in pairs]


FAULTS = [
    *_faults(
        "schedule.py",
        "test_schedule.py",
        ("if in_cycle < self.alignment_steps", "if in_cycle <= self.alignment_steps"),
        ('"alignment" if in_cycle', '"user" if not in_cycle'),
        ("return step > 0 and self.state(step)", "return self.state(step)"),
        ("self.state(step) != self.state(step - 1)", "self.state(step) == self.state(step - 1)"),
        ("min(rest, self.alignment_steps)", "rest"),
        ("return alignment if state", "return before - alignment if state"),
        ("self.alignment_steps + self.user_steps == 0", "self.alignment_steps + self.user_steps < 0"),
    ),
    *_faults(
        "proximal.py",
        "test_proximal.py test_training_laws.py test_golden.py",
        ("own.add_(d, alpha=rho)", "own.add_(d, alpha=rho / 2)"),
        ("own.add_(d, alpha=rho)", "own.sub_(d, alpha=rho)"),
        (".sum() * (rho / 2)", ".sum() * rho"),
        ("d.square().sum() for d in _differences(weights, anchor)", "d.norm() for d in _differences(weights, anchor)"),
        ("w.detach().to(torch.float32, copy=True)", "w.detach()"),
        ("w.detach().float() - a", "w.detach() - a.to(w.dtype)"),
        ("pulls = rho > 0 and", "pulls = rho > 1 and"),
        ("step.index > rests", "step.index >= rests"),
        (" and step.index > rests", ""),
    ),
    *_faults(
        "method/method.py",
        "test_interleave.py test_training_laws.py test_golden.py",
        ('        self.kept["anchor"] = snapshot(weights)\n        return', "        return"),
        ("drift = squared_distance(weights, self.anchor)", "drift = squared_distance(weights, weights)"),
        ("Draw(self.schedule.steps_in(state, step))", "Draw(step)"),
    ),
    *_faults(
        "loss.py",
        "test_loss.py",
        ('_entropies(model, p, "sum")', '_entropies(model, p, "mean")'),
        ("blocked.masked_fill_(~packed.mask", "blocked.masked_fill_(packed.mask"),
        ("// width * len(columns) + of", "// width * len(columns)"),
        ("wanted = whole.flatten(0, 1)", "wanted = 2 * whole.flatten(0, 1)"),
        ("last_hidden_state=hidden[None]", "last_hidden_state=2 * hidden[None]"),
        ("max_length > window", "max_length > 2 * window"),
        ('return "" if error <= TOLERANCE[model.dtype] else', 'return "" if error <= 1 else'),
    ),
    *_faults(
        "data/packing.py",
        "test_loss.py test_golden.py test_method_laws.py",
        ("if label != IGNORED and depth > 0:", "if label != IGNORED and depth > 1:"),
        ("mask[node, :node] = mask[parent, :node]", "mask[node, :node] = True"),
        ("self.shared_by[node] += 1", "self.shared_by[node] = 1"),
        ("positions=torch.tensor([self.depths])", "positions=torch.arange(len(self.ids))[None]"),
        ("labels[row, column + 1], (needed", "labels[row, column], (needed"),
        ("counted.flip(1).cumsum(1).flip(1) > 0", "counted.flip(1).cumsum(1).flip(1) >= 0"),
        ("places = (counted.cumsum(1) - 1)", "places = counted.cumsum(1)"),
        ("self.rows.append(row)", "self.rows.append(len(self.rows))"),
    ),
    *_faults(
        "data/interleave.py",
        "test_interleave.py test_training_laws.py",
        ("own = chosen[self.rank * share", "own = chosen[0 * share"),
        ("before = t if stream", "before = draw.before if stream"),
        ("self.batch_size * self.accumulate * self.world", "self.batch_size * self.accumulate"),
        ("if stream in self.method.rows_apart", "if self.method.rows_apart"),
        ("default_rng([seed, stream, epoch])", "default_rng([seed, stream])"),
        ("default_rng([seed, stream, epoch])", "default_rng([seed, epoch])"),
        ("sum(supervised), supervised.count(0))", "len(supervised), supervised.count(0))"),
    ),
    *_faults(
        "data/mixing.py",
        "test_interleave.py test_files.py test_training_laws.py",
        ("bad = round(harmful_ratio * n)", "bad = int(harmful_ratio * n)"),
        ("good = n - bad - safe", "good = n - bad"),
        ("int((1 - harmful_ratio) * n - safe)", "n - bad - safe"),
        ("return rows[:count]", "return rows[-count:]"),
    ),
    *_faults(
        "passes.py",
        "test_method_laws.py test_golden.py test_training_laws.py",
        ("scale = 1 / max(1, batch.tokens)", "scale = 1 / max(1, len(batch.micro_batches))"),
        ("            self.move(kept)\n", "            pass\n"),
        ("        torch.manual_seed(self.seed)\n", ""),
        ("torch.random.fork_rng(devices=devices), torch.no_grad()", "torch.no_grad()"),
    ),
    *_faults(
        "align/vaccine.py",
        "test_golden.py",
        ("self.blocks, self.rho)", "self.blocks, self.rho / 2)"),
        ("for micro in found for g in micro]", "for micro in found for g in micro[:1]]"),
    ),
    *_faults(
        "align/booster.py",
        "test_golden.py",
        ("f + self.lamb * (h - n)", "f + self.lamb * (n - h)"),
        ("w.detach() - length * g", "w.detach() + length * g"),
    ),
    *_faults(
        "align/t_vaccine.py",
        "test_golden.py test_method_laws.py",
        ("norms / norms.sum()", "norms.square() / norms.square().sum()"),
        ("if step % self.probability_steps:", "if step % self.interval_steps:"),
    ),
    *_faults(
        "align/repnoise.py",
        "test_golden.py test_method_laws.py",
        (
            "own = torch.tensor([float(sum(len(c.targets) for micro in counted for c in micro))]",
            "own = torch.tensor([float(len(counted))]",
        ),
        ("self.beta * mmd - self.alpha", "self.beta * mmd + self.alpha"),
        ("self.alpha / (1 + entropy) * a", "self.alpha * a"),
        ("self.alpha / (1 + entropy) * a", "self.alpha / entropy * a"),
        ("row += len(rows.unique())", "row += 0"),
        ("behind = pack.places > 0", "behind = pack.places >= 0"),
    ),
    *_faults(
        "method/ewc.py",
        "test_golden.py",
        ("own.add_(2 * self.lamb", "own.add_(self.lamb"),
        ("total.add_(g.square())", "total.add_(g.abs())"),
    ),
    *_faults("method/ldifs.py", "test_golden.py", ("self.rho / 2 * term", "self.rho * term")),
    *_faults(
        "method/constrained_sft.py",
        "test_golden.py test_method_laws.py",
        ("beta * (policy - reference)", "beta * (reference - policy)"),
        ("places < self.bias_length", "places <= self.bias_length"),
    ),
    *_faults("method/asft.py", "test_golden.py", ("left = b - delta.project(b)", "left = delta.project(b)")),
    *_faults(
        "method/vlguard_loss.py",
        "test_golden.py test_method_laws.py",
        ("u + self.lamb * s for", "u + s for"),
        ("self.safe_rows)}", "1)}"),
    ),
    *_faults(
        "alignment_delta.py",
        "test_repair.py",
        ("(self.root.T @ x) / self.norm", "(self.root.T @ x)"),
        ("return left.float() @ upper.T", "return left.float()"),
    ),
    *_faults(
        "repair/antidote.py",
        "test_repair.py test_golden.py",
        ("indices[:, kept:]", "indices[:, :-kept]"),
        ("power[name].sqrt() for", "power[name] for"),
    ),
    *_faults("repair/safe_lora.py", "test_repair.py", ("if value <= self.threshold", "if value >= self.threshold")),
    *_faults(
        "repair/nlsr.py",
        "test_repair.py test_golden.py",
        ("descending=not self.most_similar_first", "descending=self.most_similar_first"),
        ("return size > ordered", "return size >= ordered"),
        ("self._layers[: self._passed]", "self._layers[: self._passed + 1]"),
    ),
    *_faults(
        "stages/repair.py",
        "test_elsewhere.py",
        ("delta.to(device)", "delta"),
        ("w.to(device) for name, w in _loaded", "w for name, w in _loaded"),
    ),
    *_faults("loss.py", "test_elsewhere.py", ("[0].to(device) for packing", "[0] for packing")),
    *_faults(
        "module.py",
        "test_elsewhere.py",
        ("self.to(self.trainer.strategy.root_device)", "pass"),
        ("[t.to(self.device) for t in kept]", "list(kept)"),
    ),
    *_faults(
        "tracking.py",
        "test_tracking.py",
        ("self.logged.get(stage, -1) < step", "False"),
        ("step <= self.logged.get(stage, -1)", "False"),
        ('"resume": "must"', '"resume": "never"'),
        ("if not k.endswith(INTERVALS)", ""),
        ("if goes_on else {}", "if not goes_on else {}"),
    ),
    *_faults(
        "curate/_selector.py",
        "test_curate.py",
        ("CLIP = 1.0", "CLIP = 9.0"),
        ("2 * theta.sigmoid()", "theta.sigmoid()"),
        ("(1 - c) * own[at]", "own[at]"),
    ),
    *_faults("optim.py", "test_training_laws.py", ("math.ceil(self.warmup_ratio * self.steps)", "0")),
    *_faults(
        "module.py",
        "test_training_laws.py test_method_laws.py",
        ("self.optim.clip or math.inf", "math.inf"),
        ('checkpoint["kept"] = self.method.kept', 'checkpoint["kept"] = {}'),
        ('in checkpoint["kept"].items()', "in {}.items()"),
        ("        refuse_other_run(checkpoint", "        dict(checkpoint"),
        ("weight.copy_(saved[name])", "weight.copy_(weight)"),
        ("_mix(self.seed, step, self.global_rank)", "_mix(self.seed, 0, self.global_rank)"),
    ),
    *_faults(
        "disk.py",
        "test_training_laws.py test_folder.py",
        ('path.name + ".part")', "path.name)"),
        ("fcntl.LOCK_EX |", "fcntl.LOCK_SH |"),
    ),
    *_faults(
        "curves.py",
        "test_tracking.py test_killed.py",
        ('int(r["step"]) <= after', 'int(r["step"]) < after'),
        ('if line.endswith("\\n")', "if line"),
    ),
    *_faults(
        "cache.py",
        "test_base_model.py::test_a_cache_key_is_the_same_in_any_order "
        "test_sweep.py::test_jobs_that_start_together_align_once_and_a_killed_owner_blocks_nobody "
        "test_run.py::test_a_second_run_finds_every_stage_and_another_method_the_aligned_model test_killed.py",
        ("    final = parent / digest(key)\n", "    final = parent / 'same'\n"),
        ("sort_keys=True, ensure_ascii=False", "ensure_ascii=False"),
        ("            fcntl.flock(handle, fcntl.LOCK_EX)\n", "            pass\n"),
    ),
    *_faults(
        "judge/embedded.py",
        "test_judge_embedded.py",
        ('Verdict(label == "compliance", score', 'Verdict(label != "refusal", score'),
        ('refused=label == "refusal")', 'refused=label != "compliance")'),
    ),
    *_faults(
        "judge/refusal.py",
        "test_judge_refusal.py",
        ("Verdict(chance < 0.5, 1.0 - chance", "Verdict(chance < 0.1, 1.0 - chance"),
        ("return lists or bool(HERE.search(content))", "return bool(HERE.search(content))"),
    ),
    *_faults(
        "judge/openai.py",
        "test_judge_openai.py",
        ("score >= self.flag_from", "score > self.flag_from"),
        ("(score - 1) / 4", "score / 5"),
        ("int(found[-1])", "int(found[0])"),
    ),
    *_faults(
        "judge/win_rate.py",
        "test_judge_win_rate.py",
        ('"a" if _stands_first(pair) else "b"', '"b" if _stands_first(pair) else "a"'),
        ("return found[-1].lower()", "return found[0].lower()"),
    ),
    *_faults(
        "judge/llama_guard.py",
        "test_judge_llama_guard.py",
        ("Verdict(unsafe > safe", "Verdict(safe > unsafe"),
        ("partly = len(ids) > self.max_length", "partly = False"),
    ),
    *_faults(
        "data/datamodule.py",
        "test_training_laws.py",
        ("        self.position = state_dict", "        self.start = state_dict"),
        ("range(self.start, self.length)", "range(self.length)"),
    ),
    *_faults(
        "training.py",
        "test_training_laws.py test_killed.py",
        ("weights_only=True)", "weights_only=False)"),
        ("torch.save(checkpoint, file)", "torch.save({}, file)"),
        ("[pack]) / tokens", "[pack])"),
    ),
    *_faults("judge/moderation.py", "test_judge_moderation.py", ("> self.threshold", ">= self.threshold")),
    *_faults(
        "judge/linear.py",
        "test_judge_linear.py",
        ("Verdict(chance > 0.5, chance)", "Verdict(chance > 0.9, chance)"),
    ),
    *_faults(
        "evaluate/scores.py",
        "test_judging.py",
        ("100 * float(found.mean())", "float(found.mean())"),
        ('("harmless", "over_refusal")', '("harmful", "over_refusal")'),
        ("if j.metric == metric]", "if j.metric]"),
    ),
    *_faults(
        "curate/curate.py",
        "test_curate.py",
        ("key=lambda i: -scores[i]", "key=lambda i: scores[i]"),
        ("round(self.keep * size)", "size"),
    ),
]
