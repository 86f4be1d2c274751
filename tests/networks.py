"""Small wave functions of every kind for the tests."""

from __future__ import annotations

from typing import Any

import torch

from replicate.ansatz import WaveFunction, build_wave_function
from replicate.sector import Sector

PARAMS: dict[str, dict[str, Any]] = {
    "made": {"width": 18, "depth": 2},
    "transformer": {"d": 8, "heads": 2, "ff": 12, "layers": 2},
    "retnet": {"d": 8, "heads": 2, "ff": 12, "layers": 2},
}
KINDS = tuple(PARAMS)

# Closed shell, open shell, lopsided, and sectors whose tokens are forced early.
SECTORS = [(7, 5, 5), (6, 5, 3), (5, 1, 3), (4, 4, 1), (4, 0, 2)]


def wave_function(
    sector: Sector, kind: str, seed: int = 0, *, dtype: torch.dtype = torch.float64, spread: float = 8.0
) -> WaveFunction:
    """Random parameters; `spread` scales them up so that probabilities are far from uniform."""
    params = PARAMS[kind]
    wave = build_wave_function(sector, kind, params, 11, 1, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wave.modulus.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += (0.02 * spread * noise).to(dtype)
    return wave
