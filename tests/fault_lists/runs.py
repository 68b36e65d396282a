"""The faults that tests/faults.py puts into stages, cache, curves and judges."""

from fault_lists.fault import faults

UNHEARD = ("    if error_message is not None:\n        raise UserError(error_message)\n", "")

FAULTS = [
    *faults(
        "pipeline/stages/repair.py",
        "pipeline/test_elsewhere.py",
        ("delta.to(device)", "delta"),
        ("w.to(device) for name, w in _load_factors", "w for name, w in _load_factors"),
    ),
    *faults(
        "logger/wandb.py",
        "logger/test_wandb.py",
        ("step <= self.logged.get(stage, -1)", "False"),
        ('"resume": "must"', '"resume": "never"'),
        (" if not name.endswith(INTERVALS)", ""),
        ("if resume_arguments else {}", "if not resume_arguments else {}"),
    ),
    *faults(
        "runtime/files.py",
        "trainer/test_laws.py pipeline/test_run_folder.py",
        ('path.name + ".part")', "path.name)"),
        ("fcntl.LOCK_EX |", "fcntl.LOCK_SH |"),
    ),
    *faults(
        "logger/curves.py",
        "logger/test_wandb.py pipeline/test_killed.py",
        ('int(r["step"]) <= step', 'int(r["step"]) < step'),
        ('if line.endswith("\\n")', "if line"),
    ),
    *faults(
        "runtime/cache.py",
        "model/test_base_model.py::test_a_cache_key_is_the_same_in_any_order "
        "pipeline/test_sweep.py::test_jobs_that_start_together_align_once_and_a_killed_owner_blocks_nobody "
        "pipeline/test_run.py::test_a_second_run_finds_every_stage_and_another_method_the_aligned_model pipeline/test_killed.py",
        ("    folder = parent / short_hash(key)\n", "    folder = parent / 'same'\n"),
        ("sort_keys=True, ensure_ascii=False", "ensure_ascii=False"),
        ("            fcntl.flock(handle, fcntl.LOCK_EX)\n", "            pass\n"),
    ),
    *faults(
        "judge/embedded.py",
        "judge/test_embedded.py",
        ('Verdict(label == "compliance", score', 'Verdict(label != "refusal", score'),
        ('refused=label == "refusal")', 'refused=label != "compliance")'),
    ),
    *faults(
        "judge/refusal.py",
        "judge/test_refusal.py",
        ("Verdict(probability < 0.5, 1.0", "Verdict(probability < 0.1, 1.0"),
        ("return lists or bool(INTRODUCES.search(content))", "return bool(INTRODUCES.search(content))"),
    ),
    *faults(
        "judge/openai.py",
        "judge/test_openai.py",
        ("score >= self.flag_from", "score > self.flag_from"),
        ("(score - 1) / 4", "score / 5"),
        ("int(scores[-1])", "int(scores[0])"),
    ),
    *faults(
        "judge/win_rate.py",
        "judge/test_win_rate.py",
        ('"a" if _response_is_first(pair) else "b"', '"b" if _response_is_first(pair) else "a"'),
        ("return choices[-1].lower()", "return choices[0].lower()"),
    ),
    *faults(
        "judge/llama_guard.py",
        "judge/test_llama_guard.py",
        ("Verdict(unsafe > safe", "Verdict(safe > unsafe"),
        ("partly = len(ids) > self.max_length", "partly = False"),
    ),
    *faults("judge/moderation.py", "judge/test_moderation.py", ("> self.threshold", ">= self.threshold")),
    *faults(
        "judge/linear.py",
        "judge/test_linear.py",
        ("Verdict(probability > 0.5, probability)", "Verdict(probability > 0.9, probability)"),
    ),
    *faults(
        "evaluation/metrics.py",
        "evaluation/test_judging.py",
        ("100 * float(values.mean())", "float(values.mean())"),
        ('("harmless", "over_refusal")', '("harmful", "over_refusal")'),
        ("if j.metric == metric]", "if j.metric]"),
    ),
    *faults("runtime/cache.py", "model/test_base_model.py", UNHEARD),
    *faults("runtime/ranks.py", "model/test_base_model.py", UNHEARD),
    *faults(
        "pipeline/stages/setting.py",
        "pipeline/test_stages.py",
        ('            "max_length": cfg.data.max_length,\n', ""),
    ),
    *faults(
        "pipeline/stages/setting.py",
        "pipeline/test_stages.py",
        ('"dtype", "attention", "template"', '"dtype", "template"'),
    ),
    *faults(
        "pipeline/stages/setting.py",
        "pipeline/test_stages.py",
        ('            "precision": cfg.trainer.precision,\n', ""),
    ),
    *faults(
        "pipeline/stages/curate.py",
        "pipeline/test_stages.py",
        ('        "lora": plain(cfg.align.lora),\n', ""),
        (' if name != "keep"}', "}"),
    ),
    *faults("pipeline/stages/align.py", "pipeline/test_stages.py", ('        "rows": rows_hash(alignment),\n', "")),
    *faults(
        "pipeline/stages/finetune.py",
        "pipeline/test_stages.py",
        ('        "lora": plain(cfg.lora),\n', ""),
        ('        "optim": plain(cfg.optim),\n', ""),
        ('        "during_alignment": cfg.data.during_alignment,\n', ""),
        ('_rows": rows_hash(stream_rows)', '_rows": len(stream_rows)'),
    ),
    *faults(
        "pipeline/stages/reference.py", "pipeline/test_stages.py", ('        "lora": plain(setting.cfg.lora),\n', "")
    ),
    *faults("pipeline/stages/repair.py", "pipeline/test_stages.py", ('        "repair": plain(cfg),\n', "")),
    *faults(
        "pipeline/stages/evaluate.py",
        "pipeline/test_stages.py",
        ('        "questions": short_hash([asdict(q) for q in questions]),\n', ""),
        ('        "limits": _limits(setting),\n', ""),
    ),
    *faults(
        "evaluation/judging.py",
        "evaluation/test_judging.py",
        ("== (name, judge.version)}", "== (name, j.version)}"),
        ("verdicts = {**earlier, **_read_store(store)}", "verdicts = dict(earlier)"),
        ("return short_hash(asdict(pair))", "return digest(pair.response)"),
        ("if j.judge not in done]", "if j.judge in done]"),
    ),
    *faults(
        "judge/_endpoint.py",
        "judge/test_openai.py",
        ("self.spent + self._reserved + cost > self.max_cost", "self.spent + cost > 2 * self.max_cost"),
        ("                self.spent += paid\n", ""),
        ("for _ in range(2):", "for _ in range(9):"),
    ),
    *faults(
        "judge/_endpoint.py",
        "judge/test_endpoint_url.py",
        ('event_hooks={"request": [self._refuse_redirect]}', "event_hooks={}"),
        ("        _silence_loggers()\n", ""),
    ),
    *faults(
        "judge/_endpoint_url.py",
        "judge/test_endpoint_url.py",
        ("valid and clean and not ambiguous", "valid and clean"),
        ("not weaker and (", "("),
        ("target.raw_host == base.raw_host and ", ""),
    ),
    *faults(
        "judge/_endpoint_reply.py",
        "judge/test_endpoint_reply.py",
        ("type(prompt) is int", "isinstance(prompt, int)"),
        ("(ValueError, RecursionError)", "ValueError"),
        ("if len(body) > MAX_REPLY_BYTES:", "if False:"),
    ),
    *faults(
        "judge/base.py",
        "judge/test_endpoint_quoting.py",
        ("if suffix not in text)", "if suffix)"),
        ('_unmatched(rubric[match.end() :], "/")', "set()"),
        ('f"<{t[1]}{t[2]}-{suffix}{t[3]}>"', 'f"<{t[1]}{t[2]}-1{t[3]}>"'),
    ),
    *faults(
        "runtime/integrity.py",
        "runtime/test_integrity.py::test_a_damaged_folder_is_made_again runtime/test_integrity.py::test_a_file_that_was_added",
        ("if current[name] != recorded[name]:", "if len(current[name]) != len(recorded[name]):"),
        ("if name not in recorded:", "if False:"),
        ('if not any(part.startswith(".") for part in path.parts)', "if path.parts"),
    ),
    *faults(
        "runtime/cache.py",
        "runtime/test_integrity.py::test_the_cache_respects_the_umask",
        ("file.chmod(part.stat().st_mode & 0o666)", "file.chmod(0o644)"),
    ),
    *faults(
        "runtime/run_files.py",
        "pipeline/test_foreign_folder.py::test_a_broken_file_is_named_with_the_fix",
        ("if self.check_event(yaml.AliasEvent):", "if False:"),
        (
            "return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)",
            "return True",
        ),
    ),
    *faults(
        "trainer/checkpoint_io.py",
        "trainer/test_checkpoint_damage.py",
        ("damaged = archive.testzip()", "damaged = None"),
        ("if not names <= checkpoint", "if False and not names <= checkpoint"),
    ),
    *faults(
        "trainer/module.py",
        "trainer/test_checkpoint_damage.py::test_a_file_of_another_version_is_named",
        ('_refuse_other_shapes("weights", saved, weights)', "pass"),
        ('_refuse_other_shapes(f"moments {index}", moments, dict.fromkeys(moments, self.weights[index]))', "pass"),
    ),
    *faults(
        "config/arguments.py",
        "config/test_arguments.py",
        ("override.value() != value", "False"),
        ("override.is_sweep_override() and _exists(value)", "_exists(value)"),
    ),
    *faults(
        "config/validate.py",
        "config/test_unknown_keys.py",
        ("for key in _leaf_keys(config):", "for key in ():"),
        ('if _value(cfg, key) == "absent":', "if False:"),
    ),
    *faults(
        "pipeline/preflight.py",
        "pipeline/test_preflight.py",
        ("if tokens > embedded:", "if False:"),
        ("if length + new_tokens - 1 > positions:", "if length > positions + 10**9:"),
        ("if lora.r > max_rank:", "if False:"),
    ),
    *faults(
        "report/sweep_files.py",
        "pipeline/test_environment.py::test_a_formula_is_text_in_a_spreadsheet",
        ('return f"\'{cell}"', "return cell"),
    ),
]
