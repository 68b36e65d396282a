"""Answers by batched greedy generation, and the scores of what judges and tasks say of them, with intervals."""
