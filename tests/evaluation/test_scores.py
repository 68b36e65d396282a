"""Names of scores in metrics.json: written names can be read, and the first judge sets the names without a judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.evaluation.scores import METRICS, Score, find_score, read_scores, score_metrics

JUDGES = ("refusal", "embedded", "llama_guard", "set")
PROMPT_SETS = ("advbench", "set", "category", "harmful_score", "a-b_2")
PERCENTS = st.floats(0, 100)


@st.composite
def scores_of_judges(draw: st.DrawFn) -> list[Score]:
    judges = draw(st.lists(st.sampled_from([*JUDGES, ""]), unique=True))
    names = [*METRICS, "category/S1", "category/violence,aiding"]
    keys = [
        (model, judge, metric, prompt_set)
        for judge in judges
        for model in draw(st.lists(st.sampled_from(["aligned", "final", "gpt-x"]), unique=True))
        for metric in draw(st.lists(st.sampled_from(names if judge else METRICS), unique=True))
        for prompt_set in ("", *draw(st.lists(st.sampled_from(PROMPT_SETS), unique=True)))
        if not (prompt_set and metric.startswith("category/"))
    ]
    judged = {(model, *key) for model, judge, *key in keys if judge}
    keys = [(model, judge, *key) for model, judge, *key in keys if judge or (model, *key) not in judged]
    return [
        Score(model, judge, metric, draw(st.integers(0, 9)))
        if metric.startswith("category/")
        else Score(
            model, judge, metric, draw(PERCENTS), draw(PERCENTS), draw(PERCENTS), draw(st.integers(1, 9)), prompt_set
        )
        for model, judge, metric, prompt_set in keys
    ]


@pytest.mark.slow
@given(scores_of_judges())
def test_scores_are_read_as_they_were_written(scores: list[Score]) -> None:
    judges = list(dict.fromkeys(score.judge for score in scores if score.judge))
    metrics = {"seed": 1, "time/judge_s": 2.0, "judges": judges} | score_metrics(scores)
    loaded = read_scores(metrics)
    assert set(loaded) == set(scores)
    assert list(dict.fromkeys(score.judge for score in loaded if score.judge)) == judges
    assert set(score_metrics(loaded).items()) == set(score_metrics(scores).items())


@given(scores_of_judges())
def test_the_first_judge_sets_the_name_without_a_judge(scores: list[Score]) -> None:
    metrics = score_metrics(scores)
    for score in scores:
        first = find_score(scores, score.model, score.metric, prompt_set=score.prompt_set)
        assert first is not None
        of_set = f"set/{score.prompt_set}/" if score.prompt_set else ""
        assert metrics[f"{score.model}/{of_set}{score.metric}"] == first.value
