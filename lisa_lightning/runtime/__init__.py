"""Processes and files of a run: errors, atomic writes, the cache, ranks, memory and logs."""
