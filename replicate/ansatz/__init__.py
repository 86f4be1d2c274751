"""Ansatze by name: MADE, transformer, RetNet, and any that an installed package registers.

A package adds its own through the entry-point group ``nqs_scaling.ansatz``: a callable
``(sector: Sector, **params) -> nn.Module`` that fulfils `base.Modulus`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

import torch
from torch import nn

from replicate.ansatz.base import Level, Modulus, State, WaveFunction, log_conditionals
from replicate.ansatz.made import Made
from replicate.ansatz.phase import PhaseNetwork
from replicate.ansatz.retnet import RetNet
from replicate.ansatz.transformer import Transformer
from replicate.sector import Sector

ENTRY_POINT_GROUP = "nqs_scaling.ansatz"
BUILT_IN: dict[str, Callable[..., nn.Module]] = {"made": Made, "transformer": Transformer, "retnet": RetNet}

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "Level",
    "Made",
    "Modulus",
    "PhaseNetwork",
    "RetNet",
    "State",
    "Transformer",
    "WaveFunction",
    "build_wave_function",
    "find_ansatz",
    "log_conditionals",
]


def find_ansatz(kind: str) -> Callable[..., nn.Module]:
    """The builder of an ansatz name. Raises KeyError with the names that exist."""
    if kind in BUILT_IN:
        return BUILT_IN[kind]
    outside = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if kind not in outside:
        raise KeyError(f"ansatz {kind!r} is not one of {', '.join(sorted([*BUILT_IN, *outside]))}")
    builder: Callable[..., nn.Module] = outside[kind].load()
    return builder


def build_wave_function(
    sector: Sector,
    kind: str,
    params: Mapping[str, int | float | str],
    phase_width: int,
    phase_depth: int,
    *,
    seed: int,
    phase_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> WaveFunction:
    """A wave function with freshly drawn parameters.

    They are drawn in float32 on the CPU and then moved, so that one seed means one initial state on every
    device and in every precision; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modulus = find_ansatz(kind)(sector, **params)
        phase = PhaseNetwork(sector, phase_width, phase_depth, phase_scale)
    return WaveFunction(sector, modulus, phase).to(device=device, dtype=dtype)
