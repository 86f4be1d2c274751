"""Scaling of the step: time and memory against unique samples, |S| and N, with fitted exponents.

    python -m benchmarks.speed measure [--quick]     -> artifacts/speed/steps.csv (minutes, one thread)
    python -m benchmarks.speed draw                  -> artifacts/speed/speed.svg from that file

Every measurement runs in a process of its own, so that its peak memory is its own. `seconds` is the best of
the CPU times of its steps, which a busy machine disturbs least; the wall clock's is beside it. `bound` is
what takes the most self time by torch's profiler, in three kinds: GEMM (dense products), memory (all other
kernels), Python (time outside torch's operators).
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from replicate.memory import peak_bytes
from replicate.spec import AnsatzSpec, PhaseSpec, SamplingSpec
from replicate.trainer import Training, train

from .acceptance import peak_gemm_rate
from .cases import ANSATZE, DRAWN, ROOT, WHOLE_LIMIT, load, point

FOLDER = ROOT / "artifacts" / "speed"
GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")


@dataclass(frozen=True)
class Case:
    """One measurement. `panel`: samples, sector or size, the axis of the figure. `unique`: 0 for all."""

    panel: str
    molecule: str
    ansatz: str
    d: int = 32
    unique: int = 0
    local_energy: str = "exact"


@dataclass(frozen=True)
class Measured:
    """A row of steps.csv. `seconds`, `wall_seconds`: best step; `*_share`: of the self time of a step."""

    panel: str
    molecule: str
    ansatz: str
    local_energy: str
    d: int
    n_parameters: int
    search_space: int
    n_unique: int
    seconds: float
    wall_seconds: float
    peak_memory_bytes: int
    flops_executed: int
    gemm_share: float
    memory_share: float
    python_share: float
    gemm_rate_share: float
    load: float


def cases(quick: bool) -> Iterator[Case]:
    for ansatz in ANSATZE:
        for name in ("H2O", "H2S", "N2", *(() if quick else ("PH3",))):
            yield Case("sector", name, ansatz)
    for ansatz in ("made", "transformer"):
        for unique in (100, 300, 1000) if quick else (100, 300, 1000, 3000, 10_000):
            yield Case("samples", "Li2O", ansatz, unique=unique, local_energy="sampled")
    for unique in (30, 100) if quick else (30, 100, 300, 1000):
        yield Case("samples", "Li2O", "transformer", unique=unique)
    for name in ("H2O", "N2", "PH3")[: 1 if quick else 3]:
        for unique in (30, 100, 300):
            yield Case("samples", name, "transformer", unique=unique)
    for ansatz in ANSATZE:
        for d in (8, 16, 32, 64, 128) if quick else (8, 16, 32, 64, 128, 256):
            yield Case("size", "N2", ansatz, d=d)


def make_run(case: Case) -> Training:
    """MADE has hidden layers of 4 d units; the phase network has d units and two hidden layers."""
    shape: dict[str, int | float | str] = {"d": case.d, "heads": 4, "ff": 4 * case.d, "layers": 2}
    if case.ansatz == "made":
        shape = {"width": 4 * case.d, "depth": 2}
    if case.unique:
        sampling = SamplingSpec(regime="tree", schedule="constant", n_max=10**12, batch_max=case.unique)
    else:
        sampling = SamplingSpec(regime="whole", schedule="constant", n_max=DRAWN, batch_max=WHOLE_LIMIT)
    changes: dict[str, Any] = {
        "ansatz": AnsatzSpec(kind=case.ansatz, params=shape),
        "phase": PhaseSpec(width=case.d, depth=1),
        "sampling": sampling,
        "local_energy": case.local_energy,
    }
    made = point(case.molecule, case.ansatz, "small").model_copy(update=changes)
    return train(made, load(case.molecule))


def shares(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Self time of a step: dense products, other kernels, and what is left of the wall time to Python."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wall = 1e6 * (time.perf_counter() - began)
    kernels = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    inside = {key: spent for key, spent in kernels.items() if key.startswith("aten::")}
    gemm = sum(spent for key, spent in inside.items() if key in GEMMS)
    other = sum(inside.values()) - gemm
    return {
        "gemm_share": gemm / wall,
        "memory_share": other / wall,
        "python_share": max(0.0, 1 - (gemm + other) / wall),
    }


def measure(case: Case) -> Measured:
    run = make_run(case)
    record = run.advance()
    walls: list[float] = []
    cpus: list[float] = []
    end = time.perf_counter() + 1.5
    while not walls or (time.perf_counter() < end and len(walls) < 50):
        wall, cpu = time.perf_counter(), time.process_time()
        run.advance()
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    peak = peak_bytes()
    seconds = min(cpus)
    return Measured(
        panel=case.panel,
        molecule=case.molecule,
        ansatz=case.ansatz,
        local_energy=case.local_energy,
        d=case.d,
        n_parameters=run.n_modulus + run.n_phase,
        search_space=run.sector.size,
        n_unique=record.n_unique,
        seconds=seconds,
        wall_seconds=min(walls),
        peak_memory_bytes=peak,
        flops_executed=record.flops_executed,
        **shares(run.advance, 1 if seconds > 1 else 3),
        gemm_rate_share=record.flops_executed / seconds / peak_gemm_rate(),
        load=os.getloadavg()[0],
    )


def measure_all(quick: bool) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ("H2O", "H2S", "N2", "PH3", "Li2O"):
        load(name)  # once, before the processes
    context = multiprocessing.get_context("spawn")
    with (FOLDER / "steps.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Measured.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for case in cases(quick):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(measure, case).result()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(found).items()})
            file.flush()
            sys.stdout.write(f"{case}: {found.seconds:.4g} s, {found.peak_memory_bytes / 1e6:.0f} MB\n")
            sys.stdout.flush()


def exponent(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Slope of log y on log x, least squares, over the upper half of the decades: where it scales."""
    upper = np.log(x) >= (np.log(x.min()) + np.log(x.max())) / 2
    chosen = upper if upper.sum() >= 2 else np.ones_like(upper)
    return float(np.polyfit(np.log(x[chosen]), np.log(y[chosen]), 1)[0])


PANELS = {
    "samples": ("n_unique", "unique samples"),
    "sector": ("search_space", "determinants in the sector |S|"),
    "size": ("n_parameters", "parameters N"),
}


STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Two rows of panels: seconds and peak memory, against each axis; exponents in the legends."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "speed"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    marks = {"made": ("#0072B2", "o"), "transformer": ("#D55E00", "s"), "retnet": ("#009E73", "^")}
    for column, (panel, (axis, label)) in enumerate(PANELS.items()):
        chosen = [row for row in rows if row["panel"] == panel]
        kinds = sorted({series(row) for row in chosen})
        for row_index, (quantity, title, unit) in enumerate(
            (("seconds", "CPU time of a step (s)", 1.0), ("peak_memory_bytes", "peak memory (MB)", 1e-6))
        ):
            ax = axes[row_index, column]
            for place, kind in enumerate(kinds):
                points = sorted(
                    (float(r[axis]), float(r[quantity]) * unit) for r in chosen if series(r) == kind
                )
                x, y = (np.array(values) for values in zip(*points, strict=True))
                colour, marker = marks[kind.split()[0] if kind.split()[0] in marks else "transformer"]
                name = f"{kind}: {exponent(x, y):.2f}" if len(x) > 1 else kind
                style = STYLES[place % len(STYLES)] if panel == "samples" else "-"
                ax.loglog(x, y, ls=style, color=colour, marker=marker, ms=5, lw=1.3, label=name)
            ax.set_xlabel(label)
            ax.set_ylabel(title)
            ax.grid(True, which="major", alpha=0.3)
            ax.legend(
                fontsize=6.5, title="fitted exponent, upper half", title_fontsize=7, columnspacing=1.0,
                loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2,
            )  # fmt: skip
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def series(row: dict[str, str]) -> str:
    if row["panel"] == "samples":
        return f"{row['ansatz']} {row['molecule']} {row['local_energy']}"
    return row["ansatz"]


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Scaling of the step.")
    made.add_argument("what", choices=("measure", "draw"))
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    made.add_argument("--format", default="svg", help="of the figure: svg, png, pdf")
    arguments = made.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.what == "measure":
        measure_all(arguments.quick)
    with (FOLDER / "steps.csv").open(encoding="utf-8") as file:
        draw(list(csv.DictReader(file)), FOLDER / f"speed.{arguments.format}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
