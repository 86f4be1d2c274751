"""Executed FLOPs of one point: the matrix products of what its networks were evaluated on.

Everything comes from counts that the step has anyway (prefixes, tips, determinants), so it is always on. The
counts equal those of torch's FlopCounterMode; tests/test_flops.py names the operations that either leaves
out.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicate import flops
from replicate.ansatz.transformer import BLOCK_WIDTH
from replicate.energy import Evaluated
from replicate.spec import Point


@dataclass(frozen=True)
class NetworkFlops:
    """FLOPs of both networks of `point` on `n_qubits`; `n_modulus` stands in where there is no closed form.

    An ansatz from outside has no exact count: 2 N_mod per position is taken for it (Kaplan et al.).
    """

    point: Point
    n_qubits: int
    n_modulus: int

    @property
    def known(self) -> bool:
        """Whether the ansatz is one of ours."""
        return self.point.ansatz.kind in flops.SAMPLING

    def tree(self, cost: Evaluated, *, backward: bool = False) -> int:
        """On a prefix tree: forward, or (with `backward`) its gradient's additional products."""
        if self.known:
            modulus = flops.tree_forward(
                *self._shape,
                nodes=cost.nodes,
                tips=cost.tips,
                block_width=BLOCK_WIDTH,
                backward=backward,
            )
        else:
            modulus = self._positions(cost.nodes, backward)
        return modulus + self._phase(cost.determinants, backward)

    def flat(self, rows: int, *, backward: bool = False) -> int:
        """On whole sequences of `rows` determinants, nothing shared: forward, or what its gradient adds."""
        if self.known:
            modulus = flops.flat_forward(*self._shape, rows=rows, backward=backward)
        else:
            modulus = self._positions(rows * self.n_qubits // 2, backward)
        return modulus + self._phase(rows, backward)

    def sampling(self, nodes: tuple[int, ...], *, reuse: bool = True) -> int:
        """Drawing samples with `nodes` open prefixes per level; without `reuse` each takes a whole pass."""
        if not self.known:
            return self._positions(sum(nodes) * (1 if reuse else self.n_qubits // 2), backward=False)
        if reuse:
            return flops.sampler_forward(*self._shape, nodes=nodes)
        return flops.flat_forward(*self._shape, rows=sum(nodes))

    @property
    def _shape(self) -> tuple[str, flops.Params, int]:
        return self.point.ansatz.kind, self.point.ansatz.params, self.n_qubits

    def _positions(self, count: int, backward: bool) -> int:
        return (4 if backward else 2) * self.n_modulus * count

    def _phase(self, rows: int, backward: bool) -> int:
        phase = self.point.phase
        return flops.phase_forward(phase.width, phase.depth, self.n_qubits, rows=rows, backward=backward)
