"""Evenly spaced indices: `evenly_spaced`."""


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices below `length`, or all of them if there are fewer.

    The first of something may not represent it. Among a user's rows, mixed-in harmful ones precede all others.
    """
    count = min(length, count)
    return [i * length // count for i in range(count)]
