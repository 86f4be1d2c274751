"""Closed forms: parameters and the study's FLOP estimates, part by part."""

from __future__ import annotations

from functools import partial
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
FORMS = [*COUNTS, "recurrent", *SAMPLING, *PARTS, *PARAMETERS_ONLY, "attention"]


def defined(ansatz: str, form: str) -> bool:
    """Not every ansatz can sample in every way, has attention (or retention), or a recurrent form."""
    if form in ("attention", "recurrent"):
        return ansatz in (("transformer", "retnet") if form == "attention" else ("retnet",))
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
            raise NotImplementedError(f"{ansatz} has no {form}")

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
        if form == "recurrent":
            return flops.recurrent_estimate(params, n)
        functions = {
            "modulus_parameters": flops.modulus_parameters,
            "matmul_weights": flops.matmul_weights,
            "forward": flops.forward_estimate,
        }
        if form in functions:
            return functions[form](ansatz, params, n)
        estimate = partial(
            flops.estimate_sample, ansatz, params, *phase, n_qubits=n, n_unique_flips=molecule.unique_flips
        )
        if form == "attention":  # what attention or retention takes of the total
            return estimate()["total"] - estimate(attention=False)["total"]
        return estimate(attention=form not in PARAMETERS_ONLY)[form.removesuffix("_from_parameters")]
