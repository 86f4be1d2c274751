"""The prefix tree and the networks on it: a whole sector, or a fixed batch where that is too large."""

from __future__ import annotations

import torch

from replicate.ansatz import WaveFunction
from replicate.hamiltonian import Kernel
from replicate.sector import Sector
from replicate.trainer import train
from replicate.tree import PrefixTree, build_tree

from .cases import ANSATZE, MOLECULES, SIZES, WHOLE_LIMIT, Cases, Suite, batch_keys, point, sector, whole_keys
from .counting import count_flops, count_operators, watch

LARGE_BATCH = 10_000


def keys_of(cases: Cases, name: str) -> tuple[Sector, torch.Tensor]:
    hamiltonian = cases[name].hamiltonian
    space = sector(hamiltonian)
    if space.size <= WHOLE_LIMIT:
        return space, whole_keys(hamiltonian)
    return space, batch_keys(Kernel(hamiltonian), LARGE_BATCH)


class Tree(Suite):
    """Building the tree of a sorted batch."""

    params = (MOLECULES,)
    param_names = ("molecule",)
    quick = (("H2O",), ("N2",))

    def setup(self, cases: Cases, name: str) -> None:
        self.sector, self.keys = keys_of(cases, name)
        self.tree = build_tree(self.keys, self.sector)

    def time_build(self, cases: Cases, name: str) -> None:
        build_tree(self.keys, self.sector)

    def track_determinants(self, cases: Cases, name: str) -> int:
        return self.tree.n_leaves

    def track_prefixes(self, cases: Cases, name: str) -> int:
        return self.tree.n_nodes

    def track_tips(self, cases: Cases, name: str) -> int:
        return self.tree.n_tips


class LogPsi(Suite):
    """log psi of the tree's determinants, alone and with the gradient of both networks."""

    params = (MOLECULES, ANSATZE, SIZES)
    param_names = ("molecule", "ansatz", "size")
    quick = (
        *(("H2O", ansatz, size) for ansatz in ANSATZE for size in SIZES),
        *(("N2", ansatz, "small") for ansatz in ANSATZE),
    )

    def setup(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        space, keys = keys_of(cases, name)
        self.wave: WaveFunction = train(point(name, ansatz, size), cases[name]).wave
        self.tree: PrefixTree = build_tree(keys, space)
        self.inputs = self.wave.phase.inputs(keys)
        self.forward()  # what the tree caches for its ansatz is made here

    def forward(self) -> torch.Tensor:
        return self.wave.log_prob(self.tree).sum() + self.wave.phase.evaluate(*self.inputs).sum()

    def forward_backward(self) -> None:
        self.forward().backward()
        self.wave.zero_grad(set_to_none=True)

    def time_forward(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        with torch.no_grad():
            self.forward()

    def time_forward_backward(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        self.forward_backward()

    def peakmem_forward_backward(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        self.forward_backward()

    def track_n_modulus(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return self.wave.n_modulus

    def track_n_phase(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return self.wave.n_phase

    def track_prefixes_evaluated(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        with watch(self.wave) as seen:
            self.forward()
        return seen.prefixes

    def track_flops_forward(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return count_flops(self.forward)

    def track_flops_forward_backward(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return count_flops(self.forward_backward)

    def track_operators_forward_backward(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return count_operators(self.forward_backward)
