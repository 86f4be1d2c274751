"""Progress for people: a bar on a terminal, plain lines elsewhere. Points done, failures, time left."""

from __future__ import annotations

import sys

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} points in {elapsed}{postfix}"  # points differ: no rate


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best; "-" where unknown."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


class Log:
    """Progress of `total` points, on stderr."""

    def __init__(self, total: int) -> None:
        self._total, self._count = total, 0
        self._bar = None
        if total and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="point", dynamic_ncols=True, bar_format=BAR)

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def advance(self, line: str, failures: int, left: float | None) -> None:
        """One more point has ended; `left`: seconds until the last will, if known."""
        self._count += 1
        eta = "" if left is None or self._count == self._total else f"about {duration(left)} left"
        failed = f"{failures} failed" if failures else ""
        if self._bar is not None:
            self.say(f"[{self._count}/{self._total}] {line}")
            self._bar.set_postfix_str(", ".join(filter(None, (failed, eta))), refresh=False)
            self._bar.update()
        else:
            self.say(f"[{self._count}/{self._total}] " + "; ".join(filter(None, (line, failed, eta))))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
