"""Re-run stored points and compare: bit for bit on the same machine and versions, else within tolerances."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from replicate import provenance
from replicate.run import run_point
from replicate.spec import Point
from replicate.store import Store

# Measured on the day, not results.
NOT_COMPARED = ("wall_seconds", "evaluation_seconds", "peak_memory_bytes")
# Another processor rounds differently and training amplifies it: the energy may move within this, in Hartree.
ENERGY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """`outcome`: identical, close (other machine or versions, energy within tolerance) or different."""

    id: str
    point: str
    outcome: str
    differs: tuple[str, ...]
    energy_stored: float
    energy_now: float
    same_place: bool

    def record(self) -> dict[str, Any]:
        return asdict(self)


def choose(points: Sequence[Point], store: Store, sample: int, seed: int = 0) -> list[Point]:
    """`sample` stored points, the same ones for the same seed."""
    done = sorted((p for p in points if store.check_point(p.id)), key=lambda p: p.id)
    return random.Random(seed).sample(done, min(sample, len(done)))


def same_place(stored: dict[str, Any]) -> bool:
    """Whether bits can be expected to agree: one process, same versions, processor and device kind."""
    here = provenance.collect()
    return (
        stored["versions"] == here["versions"]
        and stored.get("ranks", 1) == 1
        and stored["hardware"]["cpu"] == here["hardware"]["cpu"]
        and stored["accelerator"] == here["accelerator"]
    )


def compare(point: Point, stored: xr.Dataset, now: xr.Dataset) -> Verdict:
    """Every stored number but the timings, compared by its bits (NaN equals NaN)."""
    names = sorted({str(name) for data in (stored, now) for name in data.variables} - set(NOT_COMPARED))
    differs = tuple(
        name
        for name in names
        if name not in stored
        or name not in now
        or not np.array_equal(stored[name].values, now[name].values, equal_nan=True)
    )
    place = same_place(json.loads(stored.attrs["provenance"]))
    before, after = float(stored["energy"]), float(now["energy"])
    close = not place and abs(before - after) <= ENERGY_TOLERANCE
    outcome = "identical" if not differs else "close" if close else "different"
    return Verdict(point.id, str(point), outcome, differs, before, after, place)


def verify(points: Sequence[Point], store: Store, cache: Path | None, device: str) -> list[Verdict]:
    """Run each point anew in a scratch folder, with the threads it was made with, and compare."""
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        scratch = Store(Path(folder))
        scratch.prepare()
        for point in points:
            stored = store.read_point(point.id)
            if stored is None:
                continue
            recorded = json.loads(stored.attrs["provenance"])
            torch.set_num_threads(int(recorded["threads"].get("torch", 1)))
            now = run_point(point, scratch, device=device, cache=cache)
            if now is not None:
                verdicts.append(compare(point, stored, now))
    return verdicts
