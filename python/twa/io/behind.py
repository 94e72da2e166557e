"""`Behind`: calls that another thread makes, one after the other, while this one goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Behind:
    """A thread for calls whose results nobody needs, such as writes to a file.

        with Behind() as behind:
            behind(file.write, data)
            ...
            behind.wait()

    Leaving it waits for all calls. An error of a call is raised by the next `wait`, or by leaving.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="twa-write")
        self._pending: list[Future[object]] = []

    def __call__(self, call: Callable[..., object], *args: object) -> None:
        """Has call(*args) made after those before it."""
        self._pending.append(self._pool.submit(call, *args))

    def wait(self) -> None:
        """Returns when all calls were made; raises the first one's error, if one had one."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.wait()
