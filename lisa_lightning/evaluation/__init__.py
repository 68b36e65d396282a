"""Answers by batched greedy generation, and their metrics with confidence intervals. Start at `evaluator.Evaluator`."""
