"""Local energies of a fixed batch in the three modes; the study's own, `paper`, on a handful only."""

from __future__ import annotations

from replicate.energy import LOCAL_ENERGY, LocalEnergies
from replicate.trainer import train

from .cases import ANSATZE, BATCH, MOLECULES, SIZES, Cases, Suite, batch_keys, point
from .counting import count_operators, watch

ROWS = {"exact": BATCH, "sampled": BATCH, "paper": 4}


class LocalEnergy(Suite):
    """Everything outside the one-pass regime: connected determinants, amplitudes, contraction."""

    params = (MOLECULES, ANSATZE, SIZES, list(ROWS))
    param_names = ("molecule", "ansatz", "size", "mode")
    quick = tuple(("N2", ansatz, "small", mode) for ansatz in ANSATZE for mode in ROWS)

    def setup(self, cases: Cases, name: str, ansatz: str, size: str, mode: str) -> None:
        self.run = train(point(name, ansatz, size, local_energy=mode), cases[name])
        self.keys = batch_keys(self.run.kernel, ROWS[mode])
        self.mode = LOCAL_ENERGY[mode]

    def find(self) -> LocalEnergies:
        return self.mode(self.run.wave, self.run.kernel, self.keys, self.run.chunk)

    def time_find(self, cases: Cases, name: str, ansatz: str, size: str, mode: str) -> None:
        self.find()

    def peakmem_find(self, cases: Cases, name: str, ansatz: str, size: str, mode: str) -> None:
        self.find()

    def track_determinants(self, cases: Cases, name: str, ansatz: str, size: str, mode: str) -> int:
        with watch(self.run.wave) as seen:
            self.find()
        return seen.determinants

    def track_prefixes(self, cases: Cases, name: str, ansatz: str, size: str, mode: str) -> int:
        with watch(self.run.wave) as seen:
            self.find()
        return seen.prefixes

    def track_operators(self, cases: Cases, name: str, ansatz: str, size: str, mode: str) -> int:
        return count_operators(self.find)
