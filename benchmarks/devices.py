"""The same step on a CPU core and on a GPU, and how much of it a GPU spends waiting for its host.

    python -m benchmarks.devices [--device cuda] [--only REGEX] [--repeats 50] [--csv FILE] [--profile]

Medians of wall time of whole steps (sampling, local energy, gradient, update), which end with the transfer
of the step's record. `way`: `step` as it is called from Python, `graph` recorded once and replayed
(replicate/capture.py; sectors in one pass only). Operators are those that torch dispatches in a step.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from replicate.spec import SamplingSpec
from replicate.trainer import Training, train

from .acceptance import timed
from .cases import ANSATZE, DRAWN, SIZES, WHOLE_LIMIT, load, point

LONG = 1.0  # seconds: of a step that is repeated three times only


@dataclass(frozen=True)
class Case:
    """What a step is made of. `mode`: `whole`, or the local energy of 10 000 unique samples."""

    molecule: str
    ansatz: str
    size: str
    mode: str

    def __str__(self) -> str:
        return f"{self.molecule} {self.ansatz} {self.size} {self.mode}"


def cases() -> Iterator[Case]:
    for molecule in ("H2O", "N2", "PH3"):
        for ansatz in ANSATZE:
            for size in SIZES:
                yield Case(molecule, ansatz, size, "whole")
    for ansatz in ANSATZE:
        for mode in ("sampled", "exact"):
            yield Case("Li2O", ansatz, "small", mode)
    yield Case("Li2O", "transformer", "large", "exact")


def make_run(case: Case, device: str, capture: bool) -> Training:
    if case.mode == "whole":
        sampling = SamplingSpec(regime="whole", schedule="constant", n_max=DRAWN, batch_max=WHOLE_LIMIT)
        made = point(case.molecule, case.ansatz, case.size, sampling=sampling)
    else:
        sampling = SamplingSpec(regime="tree", schedule="constant", n_max=10**12, batch_max=10_000)
        made = point(case.molecule, case.ansatz, case.size, sampling=sampling, local_energy=case.mode)
    return train(made, load(case.molecule), device=device, capture=capture)


@dataclass(frozen=True)
class Row:
    """One measurement; `gflops`: executed, per second."""

    molecule: str
    ansatz: str
    size: str
    mode: str
    device: str
    way: str
    ms: float
    gflops: float
    parameters: int
    memory_gb: float


def measure(case: Case, device: str, way: str, repeats: int) -> Row:
    gpu = device != "cpu"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    run = make_run(case, device, capture=way == "graph")
    warm = timed(run.advance, 1 if not gpu else 5).wall
    seconds = timed(run.advance, repeats if warm < LONG else 3).wall
    executed = run.advance().flops_executed
    memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0
    name = torch.cuda.get_device_name() if gpu else "CPU, one thread"
    return Row(
        case.molecule,
        case.ansatz,
        case.size,
        case.mode,
        name,
        way,
        1e3 * seconds,
        executed / seconds / 1e9,
        run.n_modulus + run.n_phase,
        memory,
    )


def profile(case: Case, device: str, way: str) -> str:
    """Where a step's time goes, by kernel."""
    run = make_run(case, device, capture=way == "graph")
    for _ in range(6):
        run.advance()
    with torch.profiler.profile() as seen:
        for _ in range(5):
            run.advance()
    return str(
        seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=18, max_name_column_width=60)
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__.splitlines()[0])
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    made.add_argument("--only", metavar="REGEX", default="", help="cases, such as 'N2 .* small'")
    made.add_argument("--repeats", type=int, default=50, help="steps per median")
    made.add_argument("--csv", type=Path, metavar="FILE", help="append the table here")
    made.add_argument("--profile", action="store_true", help="kernels of each case instead")
    arguments = made.parse_args(argv)
    rows: list[Row] = []
    for case in cases():
        if not re.search(arguments.only, str(case)):
            continue
        graphs = arguments.device == "cuda" and case.mode == "whole"
        for way in ("step", "graph") if graphs else ("step",):
            if arguments.profile:
                sys.stdout.write(f"== {case} {way}\n{profile(case, arguments.device, way)}\n")
                continue
            rows.append(measure(case, arguments.device, way, arguments.repeats))
            last = rows[-1]
            sys.stdout.write(
                f"{case!s:<34} {way:<6} {last.ms:10.2f} ms {last.gflops:10.1f} GFLOP/s"
                f" {last.memory_gb:7.2f} GB  N = {last.parameters}\n"
            )
            sys.stdout.flush()
    if arguments.csv and rows:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
            if new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
