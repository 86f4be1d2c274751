"""Closed forms: parameters and the study's FLOP estimates, part by part."""

from __future__ import annotations

from typing import Any

from replicate import flops

from .cases import ANSATZE, MOLECULES, SHAPES, SIZES, Suite, spec

PARTS = [
    "sampling",
    "local_energy_modulus",
    "local_energy_phase",
    "gradient_modulus",
    "gradient_phase",
    "total",
]
FORMS = ["modulus_parameters", "phase_parameters", "matmul_weights", "forward", "sampling_cached", *PARTS]


class ClosedForm(Suite):
    """FLOPs per unique sample and step; n and M are those of the molecule table."""

    params = (MOLECULES, ANSATZE, SIZES, FORMS)
    param_names = ("molecule", "ansatz", "size", "form")
    quick = tuple(
        (name, ansatz, size, form)
        for name in MOLECULES
        for ansatz in ANSATZE
        for size in SIZES
        for form in FORMS
    )

    def setup_cache(self) -> dict[str, Any]:
        return {}  # nothing to compute

    def track_value(self, cases: Any, name: str, ansatz: str, size: str, form: str) -> int:
        molecule, shape = spec(name), SHAPES[size]
        n, params, phase = molecule.n_spin_orbitals, shape.ansatz[ansatz], shape.phase
        assert n is not None
        assert molecule.unique_flips is not None
        if form == "phase_parameters":
            return flops.phase_parameters(*phase, n)
        if form == "sampling_cached":
            return flops.sampling_estimate(ansatz, params, n, cache=True)
        functions = {
            "modulus_parameters": flops.modulus_parameters,
            "matmul_weights": flops.matmul_weights,
            "forward": flops.forward_estimate,
        }
        if form in functions:
            return functions[form](ansatz, params, n)
        parts = flops.estimate_sample(
            ansatz, params, *phase, n_qubits=n, n_unique_flips=molecule.unique_flips
        )
        return parts[form]
