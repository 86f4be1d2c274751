"""Runs of 20 steps, on one process or several: one text, so that both sides of a comparison are the same.

    torchrun --nproc-per-node K tests/ranks_cases.py FOLDER KIND...

The first rank writes what `result` returns of every case of these ansatze to FOLDER/results.json, and its
checkpoint from half way to FOLDER/<case>.pt.
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
from replicate.molecule import load_molecule
from replicate.ranks import ALONE, Group
from replicate.spec import AnsatzSpec, EvaluationSpec, MoleculeSpec, PhaseSpec, Point, SamplingSpec, TrainSpec
from replicate.trainer import Checkpoint, Training, train

STEPS = 20
# Many samples: where rounding turns the acceptance of one random number, all that follow differ, too, and
# then the results by the sampling noise, not by rounding.
MANY = {"schedule": "constant", "n_max": 10**12}
# Whole sectors (LiH has 225 determinants) and growing trees that keep a part of them.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "whole": {"sampling": SamplingSpec(regime="whole")},
    "whole, a part sampled": {
        "sampling": SamplingSpec(regime="whole", batch_max=60),
        "local_energy": "sampled",
    },
    "tree": {"sampling": SamplingSpec(regime="tree", batch_max=60)},
    "tree, sampled": {"sampling": SamplingSpec(regime="tree", batch_max=60), "local_energy": "sampled"},
    "float32, whole": {"precision": "float32", "sampling": SamplingSpec(regime="whole", **MANY)},
    "float32, tree": {"precision": "float32", "sampling": SamplingSpec(regime="tree", batch_max=60, **MANY)},
}
MADE_ONLY: dict[str, dict[str, Any]] = {
    "tree, paper": {"sampling": SamplingSpec(regime="tree", batch_max=12), "local_energy": "paper"},
    "tree of one": {  # some ranks have nothing to do
        "sampling": SamplingSpec(regime="tree", batch_max=1),
        "evaluation": EvaluationSpec(exact_limit=0, n_samples=10**6, batch_max=150),
    },
    "sector of two": {"sampling": SamplingSpec(regime="whole")},  # a third rank has nothing to do
}
# One electron in two orbitals: two determinants.
TWO = MoleculeSpec(
    name="H2+", atoms=[["H", 0.0, 0.0, 0.0], ["H", 0.0, 0.0, 1.5]], charge=1, multiplicity=2, basis="sto-3g"
)
CASES = {
    f"{kind}, {name}": (kind, setting)
    for kind in KINDS
    for name, setting in (EVERYWHERE | (MADE_ONLY if kind == "made" else {})).items()
}


def start(case: str, group: Group = ALONE, resume: Checkpoint | None = None) -> Training:
    kind, setting = CASES[case]
    two = case.endswith("sector of two")
    fields: dict[str, Any] = {
        "molecule": TWO if two else spec("LiH"),
        "ansatz": AnsatzSpec(kind=kind, params=PARAMS[kind]),
        "phase": PhaseSpec(width=8, depth=1),
        "steps": STEPS,
        "precision": "float64",
        "train": TrainSpec(learning_rate=3e-3, annealing_lambda=0.3, annealing_fraction=0.6),
    }
    problem = load_molecule(TWO) if two else molecule("LiH")
    return train(Point(**{**fields, **setting}), problem, group=group, resume=resume)


def result(run: Training) -> dict[str, Any]:
    """The rest of a run, made here: its numbers as JSON."""
    records = [asdict(record) for record in run]
    weights = torch.cat([weight.detach().reshape(-1) for weight in run.weights.values()])
    return {"records": records, "weights": weights.tolist(), "evaluation": asdict(run.evaluate())}


def main(folder: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    group, results = ranks.join("cpu"), {}
    for case, (kind, _) in CASES.items():
        if kind not in kinds:
            continue
        run = start(case, group)
        first = [asdict(run.advance()) for _ in range(STEPS // 2)]
        half = run.checkpoint()
        rest = result(run)
        results[case] = {**rest, "records": first + rest["records"]}
        if group.first:
            torch.save(half.tensors, Path(folder) / f"{case}.pt")
    if group.first:
        (Path(folder) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
