"""Accuracies on a classification task without a language model, to compare a model's with: `accuracy_baselines`."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.task.base import Scored, Task

MAX_LABELS: Final = 20
"""Labels of a classification task."""
MAX_FITTED_ROWS: Final = 5000
"""Rows that the bag of words learns from if nothing is fine-tuned."""
WORD: Final = re.compile(r"\w+")


def accuracy_baselines(task: Task, rows: Rows, user: Sequence[Row]) -> Metrics:
    """Return the accuracies in percent that need no language model, for a classification task.

    - `baseline/majority_class`: every answer is the commonest label of the training rows
    - `baseline/bag_of_words`: multinomial naive Bayes on word counts, fitted on the user's task rows

    Args:
        task: the task.
        rows: all rows of the source.
        user: the user's rows. Without task rows among them, the first training rows are fitted.

    Returns:
        {} for a task without a rule or with free text as targets: more than 20 labels, or fewer than two rows a label.
    """
    labels = Counter(row.response for row in rows.train)
    distinct = labels.keys() | {row.response for row in rows.test}
    known_rows = len(rows.train) + len(rows.test)
    if not isinstance(task, Scored) or not rows.test or len(distinct) > min(MAX_LABELS, known_rows / 2):
        return {}
    majority = labels.most_common(1)[0][0]
    fitted = [row for row in user if row.response in labels] or rows.train[:MAX_FITTED_ROWS]
    return {
        "baseline/majority_class": _accuracy(task, [majority] * len(rows.test), rows.test),
        "baseline/bag_of_words": _accuracy(task, _naive_bayes(fitted, rows.test), rows.test),
    }


def _accuracy(task: Scored, answers: Sequence[str], test: Sequence[Row]) -> float:
    """Return the percentage of answers that are right by the strict rule of the task."""
    hits = [task.correct(answer, row.response) for answer, row in zip(answers, test, strict=True)]
    return 100 * sum(hits) / len(hits)


def _naive_bayes(fitted: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Return the labels that naive Bayes predicts for the test rows."""
    # Imported here, since it takes longer than all else of a run without scores.
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    # The stubs of scikit-learn allow no function as analyzer.
    make_vectorizer: Any = CountVectorizer
    vectorizer = make_vectorizer(analyzer=_words)
    classifier = MultinomialNB().fit(vectorizer.fit_transform(map(_text, fitted)), [row.response for row in fitted])
    return [str(label) for label in classifier.predict(vectorizer.transform(map(_text, test)))]


def _text(row: Row) -> str:
    """Return the text that distinguishes a row. Rows with a context share their instruction."""
    return row.context or row.instruction


def _words(text: str) -> list[str]:
    """Return the words of a text; the empty word for a text without any, so that no vocabulary is empty."""
    return WORD.findall(text.lower()) or [""]
