"""A whole optimisation step, `Training.advance`: sampling, local energies, gradient and Adam."""

from __future__ import annotations

from typing import Any

from replicate import flops
from replicate.spec import SamplingSpec
from replicate.trainer import Training, train

from .cases import ANSATZE, DRAWN, MOLECULES, SIZES, WHOLE_LIMIT, Cases, Suite, point
from .counting import count_flops, count_operators, watch

# Samples per step in the tree regime: so few that no count is truncated, where rounding could decide a tie.
GROWN = {"exact": 1000, "sampled": 10**4, "paper": 4}
# `whole`: one pass over the sector. The others: a growing tree of that many samples, by local energy.
WAYS = ["whole", *GROWN]


class Step(Suite):
    params = (MOLECULES, ANSATZE, SIZES, WAYS)
    param_names = ("molecule", "ansatz", "size", "way")
    quick = (
        *(("H2O", ansatz, "small", "whole") for ansatz in ANSATZE),
        *(("N2", ansatz, "small", way) for ansatz in ANSATZE for way in WAYS),
    )

    @classmethod
    def timed(cls, parameters: tuple[str, ...]) -> bool:
        return parameters[-1] != "paper"  # the study's way is there to be counted

    def setup(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> None:
        if way == "whole" and cases[name].search_space > WHOLE_LIMIT:
            raise NotImplementedError("the sector is not enumerated")
        sampling = SamplingSpec(regime="whole", schedule="constant", n_max=DRAWN, batch_max=WHOLE_LIMIT)
        changes: dict[str, Any] = {"sampling": sampling}
        if way != "whole":
            drawn = GROWN[way]
            sampling = SamplingSpec(
                regime="tree", schedule="constant", n_min=drawn, n_max=drawn, batch_max=2 * drawn
            )
            changes = {"sampling": sampling, "local_energy": way}
        self.point = point(name, ansatz, size, **changes)
        self.run: Training = train(self.point, cases[name])
        self.run.advance()  # the sector's matrix, Adam's moments

    def time_step(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> None:
        self.run.advance()

    def peakmem_step(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> None:
        self.run.advance()

    def track_unique(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        return self.run.advance().n_unique

    def track_prefixes_evaluated(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        with watch(self.run.wave) as seen:
            self.run.advance()
        return seen.prefixes

    def track_determinants_evaluated(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        with watch(self.run.wave) as seen:
            self.run.advance()
        return seen.determinants

    def track_flops_executed(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        """By the trainer's own accounting."""
        return self.run.advance().flops_executed

    def track_flops_sampling(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        return self.executed("sampling")

    def track_flops_forward(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        return self.executed("forward")

    def track_flops_local_energy(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        return self.executed("local_energy")

    def track_flops_backward(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        return self.executed("backward")

    def executed(self, part: str) -> int:
        """Executed FLOPs of a part of one more step."""
        before = self.run.flops_parts[part]
        self.run.advance()
        return self.run.flops_parts[part] - before

    def track_flops_counted(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        """By torch's counter: the kernel's small integer products are in it too."""
        return count_flops(self.run.advance)

    def track_flops_estimated(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        """The study's estimate for as many unique samples."""
        hamiltonian = cases[name].hamiltonian
        parts = flops.estimate_step(
            self.point,
            n_qubits=hamiltonian.n_qubits,
            n_unique_flips=hamiltonian.n_unique_flips,
            batch=self.run.advance().n_unique,
        )
        return parts["total"]

    def track_operators(self, cases: Cases, name: str, ansatz: str, size: str, way: str) -> int:
        return count_operators(self.run.advance)
