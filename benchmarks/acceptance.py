"""The numbers that the step promises, measured here and now and set beside their limits.

    python -m benchmarks.acceptance [--only REGEX] [--repeats 50] [--csv FILE]

One thread. Times are medians of wall time of `--repeats` whole steps (fewer where one takes seconds), with
the machine's load beside them; on a busy machine they say more about the machine. Each is set against the
slow twin in the same run: *flat* evaluates every distinct determinant once but shares no prefix, *paper*
makes the study's B * M forward passes (timed on a few samples and multiplied up).

Exit status: 0 every limit is met, 3 one is not.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

import torch

from replicate import flops
from replicate.energy import local_energies_paper
from replicate.hamiltonian import jordan_wigner
from replicate.memory import peak_bytes
from replicate.spec import SamplingSpec, load_study
from replicate.trainer import Training, train
from replicate.tree import tokens_of

from .cases import ANSATZE, DRAWN, ROOT, WHOLE_LIMIT, load, point, whole_keys
from .counting import count_transfers, watch

P = ParamSpec("P")
R = TypeVar("R")
MET, MISSED = 0, 3


@dataclass(frozen=True)
class Row:
    """One limit. `relation`: "=", "<=" or ">="; `note`: what was measured beside it."""

    section: str
    what: str
    relation: str
    limit: float
    value: float
    unit: str
    note: str = ""

    @property
    def met(self) -> bool:
        return {
            "=": self.value == self.limit,
            "<=": self.value <= self.limit,
            ">=": self.value >= self.limit,
        }[self.relation]

    def __str__(self) -> str:
        verdict = "met   " if self.met else "MISSED"
        limit = f"{self.relation} {self.limit:g}"
        note = f"   ({self.note})" if self.note else ""
        return f"{verdict}  {self.what:<58} {self.value:>10.4g} {self.unit:<6} {limit:<10}{note}"


# -- clocks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Medians over calls, seconds."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any], repeats: int) -> Timing:
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    return Timing(median(walls), median(cpus))


def load_average() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def alone(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call in a fresh process, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


# -- the step and its slow twins -----------------------------------------------------------------------


def whole_run(name: str, ansatz: str, size: str = "small") -> Training:
    """A whole sector per step, warmed up: its matrix, its tree and Adam's moments exist."""
    sampling = SamplingSpec(regime="whole", schedule="constant", n_max=DRAWN, batch_max=WHOLE_LIMIT)
    run = train(point(name, ansatz, size, sampling=sampling), load(name))
    for _ in range(3):
        run.advance()
    return run


def tree_run(name: str, ansatz: str, unique: int, local_energy: str) -> Training:
    """`unique` samples kept of 10^12 drawn, token by token."""
    sampling = SamplingSpec(regime="tree", schedule="constant", n_max=10**12, batch_max=unique)
    return train(point(name, ansatz, "small", sampling=sampling, local_energy=local_energy), load(name))


def make_flat(run: Training) -> None:
    """From here on the run evaluates full sequences of every determinant: no prefix is shared."""
    wave = run.wave
    object.__setattr__(wave, "log_prob", lambda tree: wave.flat_log_prob(tree.keys))


def paper_seconds(run: Training, unique: int, rows: int) -> float:
    """Local energies of `unique` samples by B * M forward passes: timed on `rows` of them, multiplied up."""
    keys = whole_keys(run.hamiltonian)[:rows]
    seconds = timed(lambda: local_energies_paper(run.wave, run.kernel, keys, 20_000), 1).wall
    return seconds / rows * unique


# -- sections ------------------------------------------------------------------------------------------


def counts(_: int) -> Iterator[Row]:
    """Prefixes that the network of a step is asked for, and tokens without a tree."""
    for name, prefixes, tokens in (("H2O", 280, 3087), ("N2", 9401, 144_000)):
        for ansatz in ANSATZE:
            run = whole_run(name, ansatz)
            with watch(run.wave) as seen:
                run.advance()
            yield Row("counts", f"{name} {ansatz}: prefixes evaluated", "=", prefixes, seen.prefixes, "")
        flat = tokens_of(whole_keys(load(name).hamiltonian), load(name).n_orbitals).numel()
        yield Row("counts", f"{name}: tokens of the flat path", "=", tokens, flat, "")


def ratios(_: int) -> Iterator[Row]:
    """Estimated over executed FLOPs of a step at the same batch."""
    least = {"made": (75, 150), "transformer": (500, 2000)}
    found: dict[tuple[str, str], float] = {}
    for place, name in enumerate(("H2O", "N2")):
        for ansatz in ANSATZE:
            run = whole_run(name, ansatz)
            record = run.advance()
            estimate = flops.estimate_step(
                run.point,
                n_qubits=run.hamiltonian.n_qubits,
                n_unique_flips=run.hamiltonian.n_unique_flips,
                batch=record.n_unique,
            )["total"]
            found[name, ansatz] = ratio = estimate / record.flops_executed
            note = f"{estimate:.3g} / {record.flops_executed:.3g}, N = {run.n_modulus} + {run.n_phase}"
            if ansatz in least:
                what = f"{name} {ansatz}: estimated / executed FLOPs"
                yield Row("ratios", what, ">=", least[ansatz][place], ratio, "x", note)
            else:
                what = f"{name} {ansatz}: the transformer's ratio / its own"
                against = found[name, "transformer"] / ratio
                yield Row("ratios", what, "<=", 1.5, max(against, 1 / against), "x", f"{ratio:.0f}x; {note}")


STEPS = {
    ("H2O", "made"): 2e-3,
    ("H2O", "transformer"): 4e-3,
    ("H2O", "retnet"): 5e-3,
    ("N2", "made"): 25e-3,
    ("N2", "transformer"): 60e-3,
    ("N2", "retnet"): 70e-3,
    ("PH3", "transformer"): 0.4,
}


def steps(repeats: int) -> Iterator[Row]:
    """Whole sectors."""
    flat_repeats, paper_rows = {"H2O": 10, "N2": 2, "PH3": 1}, {"H2O": 20, "N2": 10, "PH3": 1}
    for (name, ansatz), limit in STEPS.items():
        run = whole_run(name, ansatz)
        tree = timed(run.advance, repeats)
        said = load_average()
        paper = paper_seconds(run, run.sector.size, paper_rows[name])
        make_flat(run)
        flat = timed(run.advance, flat_repeats[name])
        note = (
            f"cpu {1e3 * tree.cpu:.3g} ms, {said}, N = {run.n_modulus} + {run.n_phase}; "
            f"flat {flat.wall / tree.wall:.1f}x, paper {paper / tree.wall:.0f}x"
        )
        what = f"{name} {ansatz}: whole step, {run.sector.size} determinants"
        yield Row("steps", what, "<=", 1e3 * limit, 1e3 * tree.wall, "ms", note)


def large_step(local_energy: str, repeats: int) -> tuple[Timing, int, float, int, str]:
    """Li2O at 10 000 unique samples: timing, unique, seconds of the flat path, peak bytes, load."""
    run = tree_run("Li2O", "transformer", 10_000, local_energy)
    last = run.advance()
    timing = timed(run.advance, repeats)
    said, peak = load_average(), peak_bytes()
    # The flat path pays for each determinant alone: some are timed, as in a step, and multiplied up.
    keys = torch.sort(run.kernel.connected(torch.tensor([run.sector.hf_key()])).key).values[:2000]
    flat_forward = timed(lambda: _no_grad(run, keys), 3).wall / len(keys)
    flat_both = timed(lambda: run.wave.flat_log_prob(keys).sum().backward(), 3).wall / len(keys)
    run.wave.zero_grad(set_to_none=True)
    evaluated = last.n_unique
    if local_energy == "exact":
        with watch(run.wave) as seen:
            run.advance()
        evaluated = seen.determinants - last.n_unique
    flat = flat_both * last.n_unique + (flat_forward * evaluated if local_energy == "exact" else 0.0)
    return timing, last.n_unique, flat, peak, said


@torch.no_grad()
def _no_grad(run: Training, keys: torch.Tensor) -> None:
    run.wave.flat_log_prob(keys)


def large(repeats: int) -> Iterator[Row]:
    """Li2O, 41 409 225 determinants, of which 10 000 are sampled."""
    for local_energy, limit, most in (("sampled", 0.5, repeats), ("exact", 15.0, min(repeats, 3))):
        timing, unique, flat, peak, said = alone(large_step, local_energy, most)
        what = f"Li2O transformer: step, {unique} unique, {local_energy}"
        note = (
            f"cpu {timing.cpu:.3g} s, median of {most}, {said}; networks alone without a tree "
            f"{flat / timing.wall:.1f}x"
        )
        yield Row("large", what, "<=", limit, timing.wall, "s", note)
        what = f"Li2O transformer: peak memory of that process, {local_energy}"
        yield Row("large", what, "<=", 8.0, peak / 1e9, "GB")


def backward(log_prob: Callable[[Any], torch.Tensor], batch: Any) -> None:
    log_prob(batch).sum().backward()


def tree_against_flat(_: int) -> Iterator[Row]:
    """Forward and backward of log p alone, every determinant once, with the tree and without, in turns."""
    for ansatz in ("transformer", "retnet"):
        run = whole_run("N2", ansatz)
        ways: dict[str, Callable[[], None]] = {
            "tree": partial(backward, run.wave.log_prob, run.batch.tree),
            "flat": partial(backward, run.wave.flat_log_prob, run.batch.tree.keys),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _turn in range(3):
            for way, call in ways.items():
                seconds[way].append(timed(call, 3).wall)
        fast, slow = (median(seconds[way]) for way in ways)
        note = f"{1e3 * slow:.0f} / {1e3 * fast:.1f} ms, {load_average()}"
        yield Row("tree_against_flat", f"N2 {ansatz}: flat / tree", ">=", 5, slow / fast, "x", note)


def transfers(_: int) -> Iterator[Row]:
    """Times that the host waits for the device in a step."""
    for name in ("H2O", "N2"):
        for ansatz in ANSATZE:
            run = whole_run(name, ansatz)
            seen = count_transfers(run.advance)
            yield Row("transfers", f"{name} {ansatz}: waits for the device", "<=", 3, len(seen), "")


def build_time(name: str, repeats: int) -> tuple[float, int, int]:
    molecule = load(name)
    integrals, built = molecule.integrals, []
    timing = timed(
        lambda: built.append(
            jordan_wigner(
                integrals.constant,
                integrals.h1,
                integrals.eri,
                n_alpha=molecule.n_alpha,
                n_beta=molecule.n_beta,
            )
        ),
        repeats,
    )
    return timing.wall, built[-1].n_pauli_terms, peak_bytes()


def hamiltonian(_: int) -> Iterator[Row]:
    """From integrals to Pauli strings; the memory is that of a process with torch loaded."""
    seconds, terms, peak = alone(build_time, "Li2O", 3)
    yield Row("hamiltonian", "Li2O: Pauli terms", "=", 20_562, terms, "")
    yield Row("hamiltonian", "Li2O: Hamiltonian from integrals", "<=", 1.0, seconds, "s", load_average())
    yield Row("hamiltonian", "Li2O: peak memory of that process", "<=", 1.0, peak / 1e9, "GB")


def peak_gemm_rate() -> float:
    """FLOP/s of a square product in float32: the machine's rate, one thread."""
    a, b = torch.rand(1536, 1536), torch.rand(1536, 1536)
    best = min(timed(lambda: a @ b, 1).wall for _ in range(10))
    return 2 * 1536**3 / best


def gemm(_: int) -> Iterator[Row]:
    """Share of the machine's GEMM rate that a whole step reaches where N is large (d = 128)."""
    machine = peak_gemm_rate()
    for ansatz in ("transformer", "retnet"):
        run = whole_run("N2", ansatz, "large")
        record = run.advance()
        timing = timed(run.advance, 5)
        rate = record.flops_executed / timing.wall
        note = f"{rate / 1e9:.1f} of {machine / 1e9:.1f} GFLOP/s, N = {run.n_modulus + run.n_phase}"
        yield Row(
            "gemm", f"N2 {ansatz}, d = 128: share of GEMM rate", ">=", 50, 100 * rate / machine, "%", note
        )


def convergence(_: int) -> Iterator[Row]:
    """Training runs of specs/convergence.toml: process CPU time up to the end, exact error."""
    study = load_study(ROOT / "specs" / "convergence.toml")
    limits = {"H2O": (0.1, 20.0), "N2": (1.6, 300.0)}
    for trained in study.points:
        name = trained.molecule.name
        molecule = load(name)
        wall, cpu = time.perf_counter(), time.process_time()
        run = train(trained, molecule)
        for _record in run:
            pass
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert molecule.e_fci is not None
        error = run.evaluate().energy - molecule.e_fci
        note = (
            f"{trained.steps} steps, wall {wall:.0f} s, {load_average()}, N = {run.n_modulus + run.n_phase}"
        )
        label = f"{name} {trained.ansatz.name}/{trained.size}"
        most, within = limits[name]
        yield Row("convergence", f"{label}: error above FCI", "<=", most, 1e3 * error, "mHa", note)
        yield Row("convergence", f"{label}: CPU time of that run", "<=", within, cpu, "s")


SECTIONS: dict[str, Callable[[int], Iterator[Row]]] = {
    "counts": counts,
    "ratios": ratios,
    "transfers": transfers,
    "hamiltonian": hamiltonian,
    "steps": steps,
    "tree_against_flat": tree_against_flat,
    "gemm": gemm,
    "large": large,
    "convergence": convergence,
}


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.acceptance",
        description="The promised numbers of the step, measured here, beside their limits.",
        epilog="Exit status: 0 all met, 2 bad arguments, 3 one is missed.",
    )
    made.add_argument("--only", metavar="REGEX", default="", help=f"sections: {', '.join(SECTIONS)}")
    made.add_argument("--repeats", type=int, default=50, help="steps per median")
    made.add_argument("--csv", type=Path, metavar="FILE", help="write the table here too")
    arguments = made.parse_args(argv)
    chosen = [name for name in SECTIONS if re.search(arguments.only, name)]
    if not chosen:
        made.error(f"--only {arguments.only}: no section matches; there are {', '.join(SECTIONS)}")
    rows: list[Row] = []
    for name in chosen:
        sys.stdout.write(f"-- {name}: {(SECTIONS[name].__doc__ or '').strip()}\n")
        for row in SECTIONS[name](arguments.repeats):
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
            rows.append(row)
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*Row.__dataclass_fields__, "met"])
            writer.writeheader()
            writer.writerows({**asdict(row), "met": row.met} for row in rows)
    missed = [row for row in rows if not row.met]
    sys.stdout.write(f"{len(rows) - len(missed)} of {len(rows)} limits met\n")
    return MISSED if missed else MET


if __name__ == "__main__":
    sys.exit(main())
