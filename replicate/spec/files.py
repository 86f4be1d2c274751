"""Molecules from files: .xyz coordinates and FCIDUMP integrals (Knowles and Handy 1989), line by line."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replicate.spec.elements import ATOMIC_NUMBER
from replicate.spec.models import MAX_SPIN_ORBITALS, MoleculeSpec, UserError

_SYMBOL_OF = {number: symbol for symbol, number in ATOMIC_NUMBER.items()}


def read_text(path: Path, shown: str) -> str:
    """The text of a file the user named, or a UserError that starts with the name as the user gave it."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{shown}: is a folder; expected a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: not a text file (UTF-8)") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror or error})") from None


def parse_xyz(text: str, shown: str) -> tuple[tuple[str, float, float, float], ...]:
    """Atoms of an .xyz file: a count, a comment, then `symbol x y z` per line (Angstrom)."""
    lines = text.splitlines()
    try:
        count = int(lines[0])
    except (IndexError, ValueError):
        raise UserError(f"{shown}: line 1: expected the number of atoms") from None
    body = [(number, line.split()) for number, line in enumerate(lines[2:], start=3) if line.strip()]
    if count < 1 or len(body) != count:
        raise UserError(f"{shown}: line 1: says {count} atoms, {len(body)} follow")
    atoms = []
    for number, fields in body:
        name = fields[0]
        symbol = _SYMBOL_OF.get(int(name), name) if name.isdigit() else name.capitalize()
        if symbol not in ATOMIC_NUMBER:
            raise UserError(f"{shown}: line {number}: unknown element {name!r}; allowed H to Kr")
        try:
            x, y, z = (float(value) for value in fields[1:4])
        except ValueError:
            raise UserError(f"{shown}: line {number}: expected `symbol x y z`") from None
        if not all(map(math.isfinite, (x, y, z))):
            raise UserError(f"{shown}: line {number}: a coordinate is not finite")
        atoms.append((symbol, x, y, z))
    return tuple(atoms)


_FCIDUMP_HEADER = re.compile(r"\s*[&$]FCI(.*?)(?:[&$]END|/)", flags=re.DOTALL | re.IGNORECASE)


def fcidump_header(text: str, shown: str) -> dict[str, int]:
    """NORB, NELEC and MS2 of an FCIDUMP namelist; open-shell (UHF) integrals are refused."""
    header = _FCIDUMP_HEADER.match(text)
    if header is None:
        raise UserError(f"{shown}: not an FCIDUMP; expected a header `&FCI NORB=.., NELEC=.., MS2=.. &END`")
    if re.search(r"\b(?:I?UHF)\s*=\s*(?:1|\.?T)", header[1], flags=re.IGNORECASE):
        raise UserError(f"{shown}: unrestricted (UHF) integrals; restricted orbitals are needed")
    found = {}
    for key, default in (("NORB", None), ("NELEC", None), ("MS2", 0)):
        value = re.search(rf"\b{key}\s*=\s*(-?\d+)", header[1], flags=re.IGNORECASE)
        if value is None and default is None:
            raise UserError(f"{shown}: FCIDUMP header lacks {key}")
        found[key] = int(value[1]) if value else 0
    if found["NORB"] < 1 or found["NELEC"] < 1:
        raise UserError(f"{shown}: FCIDUMP header: NORB and NELEC must be positive")
    return found


def fcidump_integrals(text: str, shown: str, norb: int) -> Iterator[tuple[float, int, int, int, int]]:
    """(value, p, q, r, s) of every line after the namelist, indices from 1; real integrals only.

    p q r s: (pq|rs); p q 0 0: h_pq; p 0 0 0: an orbital energy; all 0: the constant. Raises UserError with
    the line of a number that cannot be read, of an index that is out of range, and of an integral that was
    given another value before (a permutation of its indices included); and where one-electron integrals
    are missing, as in a file that was cut off.
    """
    header = _FCIDUMP_HEADER.match(text)
    assert header is not None  # fcidump_header has found it
    seen: dict[tuple[int, ...], float] = {}
    one_electron = False
    for number, line in enumerate(text[header.end() :].splitlines(), text.count("\n", 0, header.end()) + 1):
        if not line.strip():
            continue
        where = f"{shown}: line {number}"
        value, p, q, r, s = _fcidump_line(line, where)
        if not all(0 <= index <= norb for index in (p, q, r, s)):
            raise UserError(f"{where}: orbital index outside 0 to NORB = {norb}")
        if "".join("*0"[index == 0] for index in (p, q, r, s)) not in ("****", "**00", "*000", "0000"):
            raise UserError(f"{where}: indices {p} {q} {r} {s} name no integral")
        bra, ket = (p, q) if p > q else (q, p), (r, s) if r > s else (s, r)
        key = bra + ket if bra > ket else ket + bra
        before = seen.setdefault(key, value)
        if abs(before - value) > 1e-10:
            name = (
                f"({p}{q}|{r}{s})"
                if s
                else f"h({p},{q})"
                if q
                else f"orbital energy {p}"
                if p
                else "constant"
            )
            raise UserError(f"{where}: {name} was {before} before")
        one_electron = one_electron or (q > 0 and s == 0)
        yield value, p, q, r, s
    if not one_electron:
        raise UserError(f"{shown}: no one-electron integral (p q 0 0) in the file; is it cut off?")


def _fcidump_line(line: str, where: str) -> tuple[float, int, int, int, int]:
    fields = line.split()
    if line.lstrip().startswith("("):
        raise UserError(f"{where}: complex integral; only real integrals are supported")
    try:
        value = float(fields[0].replace("D", "E").replace("d", "e"))  # Fortran exponents
        p, q, r, s = (int(field) for field in fields[1:])
    except ValueError:
        raise UserError(f"{where}: expected a value and four orbital indices, got {line.strip()!r}") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: the integral is {value}")
    return value, p, q, r, s


def fill_from_file(table: dict[str, Any], base: Path, shown: str) -> dict[str, Any]:
    """A molecule table with what its `xyz` or `fcidump` file says; paths are relative to `base`.

    `shown` comes before the key in a message: the table that names the file; "" where a user named it.
    """
    table = dict(table)
    for kind in ("xyz", "fcidump"):
        if not isinstance(table.get(kind), str):
            continue
        key = f"{shown}.{kind}: " if shown else ""
        if not table[kind]:
            raise UserError(f"{key}empty; expected the name of a file")
        path = base / table[kind]
        name = f"{key}{table[kind]}"
        text = read_text(path, name)
        table[kind] = str(path.resolve())
        table["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        if kind == "xyz":
            if "atoms" not in table:  # both given: the model says so
                table["atoms"] = parse_xyz(text, name)
            else:
                del table["content_sha256"]
        else:
            header = fcidump_header(text, name)
            known = {
                "multiplicity": abs(header["MS2"]) + 1,
                "electrons": header["NELEC"],
                "spin_orbitals": 2 * header["NORB"],
            }
            for field, value in known.items():
                if table.setdefault(field, value) != value:
                    where = f"{shown}.{field}" if shown else field
                    raise UserError(f"{where}: {table[field]} given, but {path.name} has {value}")
            if (
                known["spin_orbitals"] <= MAX_SPIN_ORBITALS
            ):  # else the model refuses it, before a long reading
                for _ in fcidump_integrals(text, name, header["NORB"]):
                    pass
    return table


def molecule_from_file(
    path: str, *, charge: int | None = None, multiplicity: int | None = None, basis: str | None = None
) -> MoleculeSpec:
    """The molecule of one .xyz or FCIDUMP file given on the command line; raises UserError.

    Defaults of an .xyz file: neutral, singlet, sto-3g. An FCIDUMP says its electrons and basis itself.
    """
    from replicate.spec.problems import explain

    given = {"charge": charge, "multiplicity": multiplicity, "basis": basis}
    given = {key: value for key, value in given.items() if value is not None}
    table: dict[str, Any] = {"xyz": path, **given}
    if not path.lower().endswith(".xyz"):
        for key in ("charge", "basis"):
            if key in given:
                raise UserError(f"--{key}: an FCIDUMP ({path}) has its {key} in it; leave it away")
        table = {"fcidump": path, "basis": "as in the file", **given}
    table = fill_from_file(table, Path(), "")
    return explain(
        MoleculeSpec, {"name": Path(path).stem, **table}, lambda key: f"{path}: {key}" if key else path
    )
