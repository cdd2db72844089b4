"""Stop a training on request: between two steps, with its state saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):  # noqa: N818 (no error: the user requests it)
    """The training stopped because the user asked for it. Its state is saved.

    Attributes:
        step: number of finished steps.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after {step} iterations")
        self.step = step


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Catch SIGINT and SIGTERM in a with block, which gets an event that is set by the first signal.

    A training checks the event between two steps. A second SIGINT raises KeyboardInterrupt at once. Outside of the main
    thread, no signals are caught.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(number: int, _: object) -> None:
        if stop.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
