"""What every test run has: an end, even when a test leaves a thread or a process behind."""

import faulthandler

LAST_MINUTES_S = 120.0


def pytest_unconfigure() -> None:
    """After the summary: should the interpreter not end, say where it hangs, and end it."""
    faulthandler.dump_traceback_later(LAST_MINUTES_S, exit=True)
