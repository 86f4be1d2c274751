"""Reading FCIDUMP integral files (Knowles and Handy 1989), with the line of every mistake."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replicate.sector import MAX_QUBITS
from replicate.spec import UserError
from replicate.spec.files import fcidump_header, read_text

_HEADER_END = re.compile(r"[&$]END|/", re.IGNORECASE)


@dataclass(frozen=True)
class Fcidump:
    """Integrals over orthonormal orbitals, Hartree: h1 (T, T), eri (T, T, T, T) in chemists' order.

    ms2 = n_alpha - n_beta.
    """

    constant: float
    h1: NDArray[np.float64]
    eri: NDArray[np.float64]
    n_electrons: int
    ms2: int


def read_fcidump(path: Path | str) -> Fcidump:
    """Parse a restricted, real FCIDUMP file.

    MS2 is taken by size: the majority spin is alpha. Raises UserError with file, line and what is wrong: a
    header that is missing or impossible, more than 62 spin-orbitals, complex or unreadable numbers, indices
    out of range, integrals given twice with different values.
    """
    text = read_text(Path(path), f"{path}")
    header = fcidump_header(text, f"{path}")
    t, electrons, ms2 = header["NORB"], header["NELEC"], abs(header["MS2"])
    if 2 * t > MAX_QUBITS:
        raise UserError(f"{path}: NORB: {2 * t} spin-orbitals; supported are 2 to {MAX_QUBITS}")
    if (electrons + ms2) % 2 or ms2 > electrons or (electrons + ms2) // 2 > t:
        raise UserError(f"{path}: MS2: {header['MS2']} is impossible with NELEC = {electrons} in NORB = {t}")
    end = _HEADER_END.search(text)
    assert end is not None  # fcidump_header has found it
    first = text.count("\n", 0, end.end()) + 1

    constant, h1, eri = 0.0, np.full((t, t), np.nan), np.full((t, t, t, t), np.nan)
    for number, line in enumerate(text[end.end() :].splitlines(), start=first):
        if not line.strip():
            continue
        value, (p, q, r, s) = _entry(path, number, line, t)
        if "".join("*0"[index == 0] for index in (p, q, r, s)) not in ("****", "**00", "*000", "0000"):
            raise UserError(f"{path}: line {number}: indices {p} {q} {r} {s} name no integral")
        if s:
            p, q, r, s = p - 1, q - 1, r - 1, s - 1
            if not np.isnan(eri[p, q, r, s]) and abs(eri[p, q, r, s] - value) > 1e-10:
                raise UserError(
                    f"{path}: line {number}: ({p + 1}{q + 1}|{r + 1}{s + 1}) was {eri[p, q, r, s]} before"
                )
            for a, b, c, d in ((p, q, r, s), (r, s, p, q)):
                eri[a, b, c, d] = eri[b, a, c, d] = eri[a, b, d, c] = eri[b, a, d, c] = value
        elif q:
            if not np.isnan(h1[p - 1, q - 1]) and abs(h1[p - 1, q - 1] - value) > 1e-10:
                raise UserError(f"{path}: line {number}: h({p},{q}) was {h1[p - 1, q - 1]} before")
            h1[p - 1, q - 1] = h1[q - 1, p - 1] = value
        elif not p:
            constant = value  # indices p 0 0 0 are orbital energies, which are not needed
    return Fcidump(constant, np.nan_to_num(h1), np.nan_to_num(eri), electrons, ms2)


def _entry(path: Path | str, number: int, line: str, t: int) -> tuple[float, tuple[int, int, int, int]]:
    fields = line.split()
    if line.lstrip().startswith("("):
        raise UserError(f"{path}: line {number}: complex integral; only real integrals are supported")
    try:
        value = float(fields[0].replace("D", "E").replace("d", "e"))  # Fortran exponents
        p, q, r, s = (int(field) for field in fields[1:])
    except ValueError:
        raise UserError(
            f"{path}: line {number}: expected a value and four orbital indices, got {line.strip()!r}"
        ) from None
    if not np.isfinite(value):
        raise UserError(f"{path}: line {number}: the integral is {value}")
    if not all(0 <= index <= t for index in (p, q, r, s)):
        raise UserError(f"{path}: line {number}: orbital index outside 0 to NORB = {t}")
    return value, (p, q, r, s)
