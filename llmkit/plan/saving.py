"""How long saving is taken to last: one count for the run, which keeps that much of its time, and for `submit`."""

UNKNOWN_BYTES_PER_S = 200e6
"""What a slow shared file system takes; once a run has saved, it goes by that."""
_SLACK_S = 2.0


def reserve_s(one_save_s: float) -> float:
    """Seconds to keep for saving, generously, where one save takes so long.

    Twice that and a half more: one may be under way when the last one is asked for.
    """
    return 2 * 1.5 * one_save_s + _SLACK_S
