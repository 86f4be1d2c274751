"""Closed forms: parameters and the study's FLOP estimates, part by part."""

from __future__ import annotations

from typing import Any

from replicate import flops

from .cases import ANSATZE, MOLECULES, SHAPES, SIZES, Suite, spec

PARTS = [
    "sampling",
    "local_energy_modulus",
    "local_energy_phase",
    "forward_modulus",
    "forward_phase",
    "backward_modulus",
    "backward_phase",
    "total",
]
COUNTS = ["modulus_parameters", "phase_parameters", "matmul_weights", "forward"]
SAMPLING = [f"sampling_{convention}" for convention in ("passes", "cache", "recurrent")]
PARAMETERS_ONLY = [f"{part}_from_parameters" for part in ("sampling", "local_energy_modulus", "total")]
FORMS = [*COUNTS, *SAMPLING, *PARTS, *PARAMETERS_ONLY]


def defined(ansatz: str, form: str) -> bool:
    """Not every ansatz can sample in every way."""
    return form not in SAMPLING or form.removeprefix("sampling_") in flops.SAMPLING[ansatz]


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
        if defined(ansatz, form)
    )

    def setup_cache(self) -> dict[str, Any]:
        return {}  # nothing to compute

    def setup(self, cases: Any, name: str, ansatz: str, size: str, form: str) -> None:
        if not defined(ansatz, form):
            raise NotImplementedError(f"{ansatz} does not sample this way")

    def track_value(self, cases: Any, name: str, ansatz: str, size: str, form: str) -> int:
        molecule, shape = spec(name), SHAPES[size]
        n, params, phase = molecule.n_spin_orbitals, shape.ansatz[ansatz], shape.phase
        assert n is not None
        assert molecule.unique_flips is not None
        if form == "phase_parameters":
            return flops.phase_parameters(*phase, n)
        if form in SAMPLING:
            convention = form.removeprefix("sampling_")
            return flops.sampling_estimate(ansatz, params, n, convention=convention)
        functions = {
            "modulus_parameters": flops.modulus_parameters,
            "matmul_weights": flops.matmul_weights,
            "forward": flops.forward_estimate,
        }
        if form in functions:
            return functions[form](ansatz, params, n)
        parts = flops.estimate_sample(
            ansatz,
            params,
            *phase,
            n_qubits=n,
            n_unique_flips=molecule.unique_flips,
            attention=form not in PARAMETERS_ONLY,
        )
        return parts[form.removesuffix("_from_parameters")]
