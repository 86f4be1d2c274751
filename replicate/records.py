"""What a finished point says of itself: names, units, and which of its steps are kept.

The writer (`replicate.run`) and the reader (`replicate.cube`) share it; it loads nothing heavy.
"""

from __future__ import annotations

import math

import numpy as np

RECORDS_PER_DECADE = 24

HISTORY: dict[str, tuple[str, str]] = {
    "step": ("1", "optimisation step, the first is 1"),
    "energy": ("hartree", "energy of the step's samples"),
    "variance": ("hartree^2", "variance of the local energy over the step's samples"),
    "n_unique": ("1", "distinct determinants sampled in the step"),
    "n_samples": ("1", "samples drawn in the step"),
    "learning_rate": ("1", "learning rate of the step"),
    "grad_norm": ("1", "gradient norm before clipping"),
}

FINAL: dict[str, tuple[str, str]] = {
    "energy": ("hartree", "energy of the final, independent evaluation"),
    "energy_stderr": ("hartree", "standard error of the energy, 0 if exact over the sector"),
    "variance": ("hartree^2", "variance of the Hamiltonian in the final state"),
    "exact": ("1", "1 if energy and variance are exact over the sector"),
    "evaluation_n_unique": ("1", "distinct determinants of the final evaluation"),
    "evaluation_n_samples": ("1", "samples of the final evaluation"),
    "valid": ("1", "1 if energy and variance can be used in a fit"),
    "n_modulus": ("1", "parameters of the modulus network"),
    "n_phase": ("1", "parameters of the phase network"),
    "n_unique_mean": ("1", "distinct determinants per step, mean over all steps"),
    "n_samples_total": ("1", "samples drawn in all steps"),
    "flops_estimated": (
        "flop",
        "training FLOPs by the study's accounting (no reuse), from the recorded unique counts",
    ),
    "flops_executed": ("flop", "training FLOPs counted on what ran"),
    "wall_seconds": ("s", "wall time of training, summed over resumed parts"),
    "evaluation_seconds": ("s", "wall time of the final evaluation"),
    "peak_memory_bytes": (
        "byte",
        "peak resident memory of the process, or of the accelerator where one is used",
    ),
}


def record_grid(steps: int) -> np.ndarray:
    """Steps (1-based) whose record is kept: log-spaced, with the first and the last; int64, ascending."""
    count = 1 + math.ceil(RECORDS_PER_DECADE * math.log10(steps)) if steps > 1 else 1
    return np.unique(np.round(np.geomspace(1, steps, count)).astype(np.int64))
