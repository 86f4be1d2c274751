"""Samples, in both regimes: from the known distribution of a whole sector, and token by token."""

from __future__ import annotations

import torch

from replicate.sampler import Samples, sample_tree, split_binary
from replicate.trainer import train

from .cases import ANSATZE, MOLECULES, SIZES, Cases, Suite, point, whole_keys

DRAWN = 10**4


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Whole(Suite):
    """Joint multinomial counts of 10^12 samples over the sector."""

    params = (MOLECULES,)
    param_names = ("molecule",)
    quick = (("H2O",), ("N2",))

    def setup(self, cases: Cases, name: str) -> None:
        size = len(whole_keys(cases[name].hamiltonian))
        self.prob = torch.rand(size, dtype=torch.float64, generator=fresh()) ** 4

    def time_draw(self, cases: Cases, name: str) -> None:
        split_binary(10**12, self.prob, fresh())


class Tree(Suite):
    """10^4 samples of the untrained network, the tree grown level by level with carried state."""

    params = (MOLECULES, ANSATZE, SIZES)
    param_names = ("molecule", "ansatz", "size")
    quick = tuple(("N2", ansatz, "small") for ansatz in ANSATZE)

    def setup(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        self.wave = train(point(name, ansatz, size), cases[name]).wave

    def draw(self) -> Samples:
        return sample_tree(self.wave, DRAWN, DRAWN, fresh())

    def time_draw(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        self.draw()

    def peakmem_draw(self, cases: Cases, name: str, ansatz: str, size: str) -> None:
        self.draw()

    def track_unique(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return len(self.draw().keys)

    def track_prefixes(self, cases: Cases, name: str, ansatz: str, size: str) -> int:
        return sum(self.draw().nodes)
