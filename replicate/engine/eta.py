"""When a sweep will be done: speeds measured on the points that are done, applied to those that are not."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from replicate.plan import cell
from replicate.spec import Point


class Eta:
    """Time left, from the time that finished points took.

    A point takes the seconds per step of its own (molecule, ansatz, size, variant) if one of those is done,
    else what the plan expected of it, scaled as the finished points of its ansatz (or, without one, all of
    them) were. The pace, work done over time passed, covers any number of workers and their overheads.
    """

    def __init__(self, points: Iterable[Point], expected: Mapping[str, float | None] | None = None) -> None:
        self._left = {point.id: point for point in points}
        self._expected = expected or {}
        self._speeds: dict[
            tuple[str, ...], tuple[int, float]
        ] = {}  # cell -> longest T and its seconds per step
        self._sums: dict[str, list[float]] = defaultdict(
            lambda: [0.0, 0.0]
        )  # ansatz -> seconds taken, planned
        self._work = 0.0
        self._began = time.monotonic()

    def gone(self, point: Point) -> None:
        """Nothing more to wait for here: skipped or failed."""
        self._left.pop(point.id, None)

    def finished(self, point: Point, seconds: float, spent: float) -> None:
        """A point is done: `seconds` of training in all, `spent` of them in this sweep."""
        self.gone(point)
        self._work += spent
        steps, _ = self._speeds.get(cell(point), (0, 0.0))
        if point.steps >= steps:
            self._speeds[cell(point)] = (point.steps, seconds / point.steps)
        for name in (point.ansatz.name, ""):  # "": all
            self._sums[name][0] += seconds
            self._sums[name][1] += self._planned(point)

    def _planned(self, point: Point) -> float:
        return self._expected.get(point.id) or float(point.steps)

    def seconds(self, point: Point) -> float:
        """What a point is expected to take, once any is finished."""
        if cell(point) in self._speeds:
            return point.steps * self._speeds[cell(point)][1]
        taken, planned = self._sums.get(point.ansatz.name) or self._sums[""]
        return self._planned(point) * taken / planned

    def left(self, running: Mapping[str, float]) -> float | None:
        """Seconds until the last point is done, None before the first is. `running`: id -> seconds so far."""
        passed = time.monotonic() - self._began
        work = self._work + sum(running.values())
        if not self._speeds or not work or not passed:
            return None
        to_do = sum(max(0.0, self.seconds(point) - running.get(i, 0.0)) for i, point in self._left.items())
        return to_do * passed / work
