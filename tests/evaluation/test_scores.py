"""Names of scores in metrics.json: written names can be read, and the first judge sets the names without a judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.evaluation.scores import METRICS, Score, find_score, read_scores, score_metrics

JUDGES = ("refusal", "embedded", "llama_guard")
PERCENTS = st.floats(0, 100)


@st.composite
def scores_of_judges(draw: st.DrawFn) -> list[Score]:
    judges = draw(st.lists(st.sampled_from([*JUDGES, ""]), unique=True))
    names = [*METRICS, "category/S1", "category/violence,aiding"]
    keys = [
        (model, judge, metric)
        for judge in judges
        for model in draw(st.lists(st.sampled_from(["aligned", "final", "gpt-x"]), unique=True))
        for metric in draw(st.lists(st.sampled_from(names if judge else METRICS), unique=True))
    ]
    judged = {(model, metric) for model, judge, metric in keys if judge}
    keys = [key for key in keys if key[1] or (key[0], key[2]) not in judged]
    return [
        Score(*key, draw(st.integers(0, 9)))
        if key[2].startswith("category/")
        else Score(*key, draw(PERCENTS), draw(PERCENTS), draw(PERCENTS), draw(st.integers(1, 9)))
        for key in keys
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
        first = find_score(scores, score.model, score.metric)
        assert first is not None
        assert metrics[f"{score.model}/{score.metric}"] == first.value
