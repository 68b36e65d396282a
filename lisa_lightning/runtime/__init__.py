"""The process and its files: errors, atomic writes, the cache, ranks, memory, logs."""
