"""The little chemistry that planning needs: atomic numbers, and the size of the STO-3G basis."""

from __future__ import annotations

_SYMBOLS = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar
    K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
""".split()

ATOMIC_NUMBER = {symbol: z for z, symbol in enumerate(_SYMBOLS, start=1)}


def sto3g_orbitals(z: int) -> int | None:
    """Orbitals that STO-3G puts on one atom: its occupied shells, up to argon; None above."""
    for last, orbitals in ((2, 1), (10, 5), (18, 9)):
        if z <= last:
            return orbitals
    return None
