"""Answers by batched greedy generation, verdicts by the judge, scores."""
