"""Point -> Dataset: the only glue between physics and disk.

A point is trained step by step; its checkpoints hold what the trainer needs to go on and what was recorded so
far, so that a run that was interrupted ends with the same numbers, bit for bit, as one that was not.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from replicate import memory, provenance
from replicate.molecule import Molecule, load_molecule
from replicate.plan import estimated_parts
from replicate.ranks import ALONE, Group
from replicate.records import FINAL, HISTORY, record_grid
from replicate.spec import SCHEMA, CheckpointSpec, MoleculeSpec, Point
from replicate.store import Store, StoreError
from replicate.trainer import Checkpoint, train

if TYPE_CHECKING:
    from replicate.trainer import Evaluation, Record

MIN_UNIQUE = (
    30  # below this a sampled variance says nothing: a collapsed sampler reports 0 (FIT.md section 2)
)


@dataclass
class Progress:
    """What has been recorded of a run so far; goes into every checkpoint."""

    n_unique: np.ndarray  # int64 (steps,), zero where not yet run
    records: list[list[float]] = field(default_factory=list)
    step: int = 0
    n_samples: int = 0
    flops_executed: int = 0
    wall_seconds: float = 0.0
    wall_parts: dict[str, float] = field(default_factory=dict)
    flops_parts: dict[str, int] = field(default_factory=dict)
    resumed: int = 0

    @classmethod
    def empty(cls, steps: int) -> Progress:
        return cls(np.zeros(steps, dtype=np.int64))

    def add(self, record: Record, keep: bool) -> None:
        """Take in the record of the next step."""
        self.n_unique[self.step] = record.n_unique
        self.step += 1
        self.n_samples += int(record.n_samples)
        self.flops_executed += int(record.flops_executed)
        if keep:
            self.records.append(
                [float(self.step), *(float(getattr(record, name)) for name in list(HISTORY)[1:])]
            )

    def into(self, checkpoint: Checkpoint) -> Checkpoint:
        """The trainer's checkpoint with this progress added."""
        tensors = {
            **checkpoint.tensors,
            "run/n_unique": torch.from_numpy(self.n_unique.copy()),
            "run/records": torch.tensor(self.records, dtype=torch.float64).reshape(-1, len(HISTORY)),
        }
        names = (
            "step",
            "n_samples",
            "flops_executed",
            "wall_seconds",
            "wall_parts",
            "flops_parts",
            "resumed",
        )
        own = {name: getattr(self, name) for name in names}
        return Checkpoint(
            step=checkpoint.step, tensors=tensors, meta={"trainer": checkpoint.meta, "run": own}
        )

    @classmethod
    def split(cls, checkpoint: Checkpoint) -> tuple[Progress, Checkpoint]:
        """The inverse of `into`."""
        tensors = dict(checkpoint.tensors)
        n_unique = tensors.pop("run/n_unique").numpy()
        records = tensors.pop("run/records").tolist()
        progress = cls(n_unique, records, **checkpoint.meta["run"])
        progress.resumed += 1
        return progress, Checkpoint(step=checkpoint.step, tensors=tensors, meta=checkpoint.meta["trainer"])


@lru_cache(maxsize=4)
def _molecule(spec_json: str, threshold: float, cache: Path | None) -> Molecule:
    return load_molecule(MoleculeSpec.model_validate_json(spec_json), threshold=threshold, cache=cache)


def get_molecule(point: Point, cache: Path | None) -> Molecule:
    """The point's molecule; the last few stay in memory: a worker runs many points of few molecules."""
    return _molecule(point.molecule.model_dump_json(), point.hamiltonian_threshold, cache)


def molecule_record(molecule: Molecule) -> dict[str, Any]:
    """A molecule under the names of the cube's /molecule group; None where not computed."""
    hamiltonian = molecule.hamiltonian
    return {
        "n_spin_orbitals": 2 * molecule.n_orbitals,
        "n_alpha": molecule.n_alpha,
        "n_beta": molecule.n_beta,
        "search_space": molecule.search_space,
        "n_pauli_terms": hamiltonian.n_pauli_terms,
        "n_unique_flips": hamiltonian.n_unique_flips,
        "e_hf": molecule.e_hf,
        "e_ccsd": molecule.e_ccsd,
        "e_ccsd_t": molecule.e_ccsd_t,
        "e_fci": molecule.e_fci,
        "e_inf_sector": molecule.e_inf_sector,
        "e_inf_identity": molecule.e_inf_identity,
        "hamiltonian_sha256": hamiltonian.sha256,
        "fci_source": molecule.energy_sources["fci"],
    }


def _reset_peak_memory() -> None:
    """Start the peak anew, since a worker runs many points."""
    memory.reset_peak()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory_bytes() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else memory.peak_bytes()


def why_invalid(evaluation: Evaluation) -> str:
    """Why a final evaluation cannot enter a fit, or "" (FIT.md section 2)."""
    if not (math.isfinite(evaluation.energy) and math.isfinite(evaluation.variance)):
        return "energy or variance is not finite"
    if not evaluation.exact and evaluation.n_unique < MIN_UNIQUE:
        return f"only {evaluation.n_unique} unique samples, {MIN_UNIQUE} are needed for a variance"
    return ""


def run_point(
    point: Point,
    store: Store,
    *,
    device: str = "cpu",
    checkpoint: CheckpointSpec | None = None,
    cache: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda step: None,
    group: Group = ALONE,
) -> xr.Dataset | None:
    """Train, evaluate and store one point, going on from its checkpoint if there is one.

    `stop` is asked after every step: once it is true a checkpoint is written and None returned. The caller
    holds the point's claim. Raises what the trainer raises, and StoreError. In a `group` the first rank alone
    reads and writes, decides and returns the Dataset; its store, cache, `checkpoint` and `stop` count.
    """
    every = checkpoint or CheckpointSpec()
    _reset_peak_memory()
    molecule = group.share(lambda: get_molecule(point, cache))
    progress, resume = Progress.empty(point.steps), None
    stored = group.share(lambda: store.read_checkpoint(point.id))
    if stored is not None:
        progress, resume = Progress.split(stored)
    run = train(point, molecule, device=device, resume=resume, group=group)
    kept = set(record_grid(point.steps).tolist())
    began = last_time = time.perf_counter()
    last_step, troubled = progress.step, False
    earlier, earlier_parts, earlier_flops = progress.wall_seconds, progress.wall_parts, progress.flops_parts

    def clock() -> None:
        """Bring times and FLOPs by part up to now, those of interrupted parts of the run included."""
        progress.wall_seconds = earlier + time.perf_counter() - began
        now = getattr(run, "wall_parts", {})
        progress.wall_parts = {name: earlier_parts.get(name, 0.0) + value for name, value in now.items()}
        counted = getattr(run, "flops_parts", {})
        progress.flops_parts = {name: earlier_flops.get(name, 0) + value for name, value in counted.items()}

    for record in run:
        progress.add(record, keep=progress.step + 1 in kept)
        on_step(progress.step)
        stopping = bool(group.agree(int(stop())))
        due = (every.seconds and time.perf_counter() - last_time >= every.seconds) or (
            every.steps and progress.step - last_step >= every.steps
        )
        if group.first and (stopping or due):
            clock()
            try:
                store.write_checkpoint(point.id, progress.into(run.checkpoint()))
            except StoreError as error:
                if stopping:
                    raise
                if not troubled:  # the last checkpoint is whole and there may be room again by the end
                    store.warn(f"{error}; {point} goes on without this checkpoint")
                troubled = True
            last_time, last_step = time.perf_counter(), progress.step
        if stopping:
            return None
    if progress.step != point.steps:
        raise RuntimeError(f"the trainer ended after {progress.step} of {point.steps} steps")
    clock()
    began = time.perf_counter()
    evaluation = run.evaluate()
    evaluation_seconds = time.perf_counter() - began
    if not group.first:
        return None
    where = {**provenance.collect(), "device": device, "ranks": group.size}
    data = _dataset(point, molecule, progress, evaluation, run, evaluation_seconds, where)
    store.write_point(point.id, data)
    return data


def _dataset(
    point: Point,
    molecule: Molecule,
    progress: Progress,
    evaluation: Evaluation,
    run: Any,
    evaluation_seconds: float,
    where: dict[str, Any],
) -> xr.Dataset:
    flips, samples = molecule.hamiltonian.n_unique_flips, int(progress.n_unique.sum())
    try:  # linear in the samples, so the estimate of their sum is the sum over steps
        parts = estimated_parts(point, 2 * molecule.n_orbitals, flips, samples)
    except KeyError:  # an ansatz from outside has no closed form
        parts = {"total": math.nan}
    invalid = why_invalid(evaluation)
    final = {
        "energy": float(evaluation.energy),
        "energy_stderr": float(evaluation.energy_stderr),
        "variance": float(evaluation.variance),
        "exact": np.int8(evaluation.exact),
        "evaluation_n_unique": np.int64(evaluation.n_unique),
        "evaluation_n_samples": np.int64(evaluation.n_samples),
        "valid": np.int8(not invalid),
        "n_modulus": np.int64(run.n_modulus),
        "n_phase": np.int64(run.n_phase),
        "n_unique_mean": float(progress.n_unique.mean()),
        "n_samples_total": float(progress.n_samples),
        "flops_estimated": float(parts["total"]),
        "flops_executed": float(progress.flops_executed),
        "wall_seconds": progress.wall_seconds,
        "evaluation_seconds": evaluation_seconds,
        "peak_memory_bytes": np.int64(_peak_memory_bytes()),
    }
    table = np.array(progress.records, dtype=np.float64).reshape(-1, len(HISTORY))
    variables: dict[str, Any] = {
        name: ((), final[name], {"units": units, "long_name": text}) for name, (units, text) in FINAL.items()
    }
    for column, (name, (units, text)) in enumerate(HISTORY.items()):
        values: Any = table[:, column]
        values = values.astype(np.int64) if name in ("step", "n_unique") else values
        variables[f"history_{name}"] = ("record", values, {"units": units, "long_name": text})
    variables["n_unique"] = (
        "step",
        progress.n_unique.astype(np.int32 if progress.n_unique.max(initial=0) < 2**31 else np.int64),
        {"units": "1", "long_name": "distinct determinants sampled, every step"},
    )
    return xr.Dataset(
        variables,
        attrs={
            "Conventions": "CF-1.11",
            "title": str(point),
            "references": "arXiv:2509.12679",
            "schema": SCHEMA,
            "point_id": point.id,
            "point": json.dumps({**point.identity(), "labels": point.labels()}, sort_keys=True),
            "molecule": json.dumps(molecule_record(molecule), sort_keys=True),
            "provenance": json.dumps(where, sort_keys=True),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "regime": str(run.regime),
            "resumed": progress.resumed,
            "invalid_reason": invalid,
            "flops_estimated_parts": json.dumps(parts, sort_keys=True),
            "flops_executed_parts": json.dumps(progress.flops_parts, sort_keys=True),
            "wall_parts": json.dumps(progress.wall_parts, sort_keys=True),
        },
    )


def format_uncertain(value: float, error: float) -> str:
    """A value with its uncertainty in the last digit: -7.78441(3); eight decimals where it is exact."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.8f}"
    digits = max(0, -math.floor(math.log10(error)))
    last = round(error * 10**digits)
    if last == 10:  # 0.096 rounds to 0.1
        digits, last = digits - 1, 1
    return f"{value:.{digits}f}({last})" if digits > 0 else f"{value:.0f}({round(error)})"


def summarise(point: Point | str, data: Mapping[Any, Any]) -> str:
    """One finished point (or its title) in one line, uncertainty with the value."""
    energy = format_uncertain(float(data["energy"]), float(data["energy_stderr"]))
    return (
        f"{point}: {energy} Ha, variance {float(data['variance']):.2e} Ha^2, "
        f"{float(data['flops_executed']):.1e} FLOP, {float(data['wall_seconds']):.1f} s"
    )
