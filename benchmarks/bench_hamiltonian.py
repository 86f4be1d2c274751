"""Hamiltonians: from integrals to Pauli strings, and matrix elements between determinants."""

from __future__ import annotations

import torch

from replicate.hamiltonian import Hamiltonian, Kernel, jordan_wigner

from .cases import MOLECULES, Cases, Suite, batch_keys, whole_keys


def build(cases: Cases, name: str) -> Hamiltonian:
    molecule = cases[name]
    integrals = molecule.integrals
    return jordan_wigner(
        integrals.constant,
        integrals.h1,
        integrals.eri,
        n_alpha=molecule.n_alpha,
        n_beta=molecule.n_beta,
    )


class Build(Suite):
    """Integrals to Pauli strings grouped by flip pattern."""

    params = (MOLECULES,)
    param_names = ("molecule",)
    quick = (("H2O",), ("N2",))

    def time_build(self, cases: Cases, name: str) -> None:
        build(cases, name)

    def peakmem_build(self, cases: Cases, name: str) -> None:
        build(cases, name)

    def track_pauli_terms(self, cases: Cases, name: str) -> int:
        return build(cases, name).n_pauli_terms

    def track_unique_flips(self, cases: Cases, name: str) -> int:
        return build(cases, name).n_unique_flips

    def track_search_space(self, cases: Cases, name: str) -> int:
        return cases[name].search_space


class Connected(Suite):
    """Matrix elements of a batch: with everything connected to it, and within itself."""

    params = (MOLECULES,)
    param_names = ("molecule",)
    quick = (("H2O",), ("N2",))

    def setup(self, cases: Cases, name: str) -> None:
        self.kernel = Kernel(cases[name].hamiltonian)
        self.keys = batch_keys(self.kernel)

    def time_connected(self, cases: Cases, name: str) -> None:
        self.kernel.connected(self.keys)

    def peakmem_connected(self, cases: Cases, name: str) -> None:
        self.kernel.connected(self.keys)

    def time_within(self, cases: Cases, name: str) -> None:
        self.kernel.within(self.keys)

    def track_batch(self, cases: Cases, name: str) -> int:
        return len(self.keys)

    def track_elements(self, cases: Cases, name: str) -> int:
        return len(self.kernel.connected(self.keys).key)

    def track_connected_determinants(self, cases: Cases, name: str) -> int:
        return len(torch.unique(self.kernel.connected(self.keys).key))

    def track_elements_within(self, cases: Cases, name: str) -> int:
        return len(self.kernel.within(self.keys).row)


class SectorMatrix(Suite):
    """The sparse matrix of a whole sector and its product with a complex psi (two real columns)."""

    params = (MOLECULES,)
    param_names = ("molecule",)
    quick = (("H2O",), ("N2",))

    def setup(self, cases: Cases, name: str) -> None:
        self.keys = whole_keys(cases[name].hamiltonian)
        self.kernel = Kernel(cases[name].hamiltonian)


class SectorMatrixBuild(SectorMatrix):
    def time_matrix(self, cases: Cases, name: str) -> None:
        self.kernel.sector_matrix(self.keys)

    def peakmem_matrix(self, cases: Cases, name: str) -> None:
        self.kernel.sector_matrix(self.keys)

    def track_elements(self, cases: Cases, name: str) -> int:
        return self.kernel.sector_matrix(self.keys).values().shape[0]


class SectorMatrixProduct(SectorMatrix):
    def setup(self, cases: Cases, name: str) -> None:
        super().setup(cases, name)
        self.matrix = self.kernel.sector_matrix(self.keys)
        self.psi = torch.rand(
            len(self.keys), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )

    def time_product(self, cases: Cases, name: str) -> None:
        self.matrix @ self.psi
