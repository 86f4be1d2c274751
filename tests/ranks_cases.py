"""Runs of a few steps, on one process or several: one file, so that both sides of a comparison are the same.

    torchrun --nproc-per-node K tests/ranks_cases.py FOLDER

The first rank writes what `result` returns of every case to FOLDER/results.json, and checkpoints from half
way to FOLDER/<case>.pt.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from chemistry import molecule, spec
from networks import KINDS, PARAMS

from replicate import ranks
from replicate.molecule import Molecule, load_molecule
from replicate.ranks import ALONE, Group
from replicate.spec import AnsatzSpec, EvaluationSpec, MoleculeSpec, PhaseSpec, Point, SamplingSpec, TrainSpec
from replicate.trainer import Checkpoint, Training, train

STEPS = 20
# Whole sectors in one pass, partial ones as a growing tree, and shares that are empty on some ranks.
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"sampling": SamplingSpec(regime="whole")},
    "whole few": {"sampling": SamplingSpec(regime="whole", batch_max=60), "local_energy": "sampled"},
    "tree": {"sampling": SamplingSpec(regime="tree", batch_max=60)},
    "tree sampled": {"sampling": SamplingSpec(regime="tree", batch_max=60), "local_energy": "sampled"},
    "tree paper": {"sampling": SamplingSpec(regime="tree", batch_max=12), "local_energy": "paper"},
    "tree of two": {
        "sampling": SamplingSpec(regime="tree", batch_max=2),
        "evaluation": EvaluationSpec(exact_limit=0, n_samples=10**6, batch_max=150),
    },
    "sector of two": {"sampling": SamplingSpec(regime="whole")},
}
CASES = [
    (kind, setting, precision)
    for kind in KINDS
    for setting in SETTINGS
    for precision in ("float64", "float32")
]
# One electron in two orbitals: two determinants.
TWO = MoleculeSpec(
    name="H2+", atoms=[["H", 0.0, 0.0, 0.0], ["H", 0.0, 0.0, 1.5]], charge=1, multiplicity=2, basis="sto-3g"
)


def name_of(case: tuple[str, str, str]) -> str:
    return "-".join(case).replace(" ", "-")


def problem(setting: str) -> Molecule:
    return load_molecule(TWO) if setting == "sector of two" else molecule("LiH")


def start(case: tuple[str, str, str], group: Group = ALONE, resume: Checkpoint | None = None) -> Training:
    kind, setting, precision = case
    point = Point(
        molecule=TWO if setting == "sector of two" else spec("LiH"),
        ansatz=AnsatzSpec(kind=kind, params=PARAMS[kind]),
        phase=PhaseSpec(width=8, depth=1),
        steps=STEPS,
        precision=precision,
        train=TrainSpec(learning_rate=3e-3, annealing_lambda=0.3, annealing_fraction=0.6),
        **SETTINGS[setting],
    )
    return train(point, problem(setting), group=group, resume=resume)


def result(run: Training) -> dict[str, Any]:
    """What is left of a run, made here, and its numbers, as JSON."""
    records = [asdict(record) for record in run]
    weights = torch.cat([weight.detach().reshape(-1) for weight in run.weights.values()])
    return {
        "records": records,
        "weights": weights.tolist(),
        "evaluation": asdict(run.evaluate()),
        "flops": run.flops_parts,
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    group = ranks.join("cpu")
    results = {}
    for case in CASES:
        results[name_of(case)] = result(start(case, group))
        if case[2] == "float64":
            run = start(case, group)
            for _ in range(STEPS // 2):
                run.advance()
            if group.first:
                saved = run.checkpoint()
                torch.save(
                    {"step": saved.step, "tensors": saved.tensors, "meta": saved.meta},
                    Path(folder) / f"{name_of(case)}.pt",
                )
    if group.first:
        (Path(folder) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
