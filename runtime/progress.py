"""Progress bars, shown by the main process only.

Where stderr is not a terminal, as in the log of a batch system, a bar is a line every 30 seconds.
This file knows nothing of what is counted.
"""

import io
import sys
import time

from tqdm import tqdm

from runtime import processes

SECONDS = 30.0  # between two lines


def progress(
    total: int, desc: str, unit: str, initial: int = 0, leave: bool = True, **settings: object
) -> tqdm:
    """A tqdm bar of `total` things, `initial` of them done before; `settings` are tqdm's own.

    leave: whether the bar, or a last line, stays when it is closed.
    """
    bar = tqdm if sys.stderr.isatty() else _Lines
    hidden = settings.pop("disable", False) or not processes.is_main()
    common = {"dynamic_ncols": bar is tqdm, "disable": hidden, "initial": initial, "leave": leave}
    return bar(total=total, desc=desc, unit=unit, **common, **settings)


class _Lines(tqdm):
    """A bar that writes lines instead of drawing over itself."""

    def __init__(self, **settings: object) -> None:
        self._due, self._said = time.monotonic() + SECONDS, -1
        # With miniters=1 every update looks at the clock, however the speed changes.
        super().__init__(file=io.StringIO(), miniters=1, **settings)

    def display(self, *args: object, **kwargs: object) -> bool:
        """What tqdm calls wherever it would draw."""
        if time.monotonic() >= self._due:
            self._line()
        return True

    def close(self) -> None:
        if not self.disable:
            if self.leave and self._said != self.n:
                self._line()
            self._due = float("inf")
            super().close()

    def _line(self) -> None:
        # Without a rate the line tells the average one, which jumps less than the latest.
        print(self.format_meter(**{**self.format_dict, "rate": None}), file=sys.stderr, flush=True)
        self._due, self._said = time.monotonic() + SECONDS, self.n
