"""Molecules from files: .xyz coordinates and the header of an FCIDUMP."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from replicate.spec.elements import ATOMIC_NUMBER
from replicate.spec.models import MoleculeSpec, UserError

_SYMBOL_OF = {number: symbol for symbol, number in ATOMIC_NUMBER.items()}


def read_text(path: Path, shown: str) -> str:
    """The text of a file the user named, or a UserError that starts with the name as the user gave it."""
    try:
        return path.read_text(encoding="utf-8")
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
        atoms.append((symbol, x, y, z))
    return tuple(atoms)


def fcidump_header(text: str, shown: str) -> dict[str, int]:
    """NORB, NELEC and MS2 of an FCIDUMP namelist; open-shell (UHF) integrals are refused."""
    header = re.match(r"\s*[&$]FCI(.*?)(?:[&$]END|/)", text, flags=re.DOTALL | re.IGNORECASE)
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


def fill_from_file(table: dict[str, Any], base: Path, shown: str) -> dict[str, Any]:
    """A molecule table with what its `xyz` or `fcidump` file says; paths are relative to `base`."""
    table = dict(table)
    for kind in ("xyz", "fcidump"):
        if not isinstance(table.get(kind), str):
            continue
        path = base / table[kind]
        text = read_text(path, f"{shown}.{kind}: {table[kind]}")
        table[kind] = str(path.resolve())
        table["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        if kind == "xyz":
            if "atoms" not in table:  # both given: the model says so
                table["atoms"] = parse_xyz(text, f"{shown}.xyz: {path.name}")
            else:
                del table["content_sha256"]
        else:
            header = fcidump_header(text, f"{shown}.fcidump: {path.name}")
            known = {
                "multiplicity": abs(header["MS2"]) + 1,
                "electrons": header["NELEC"],
                "spin_orbitals": 2 * header["NORB"],
            }
            for key, value in known.items():
                if table.setdefault(key, value) != value:
                    raise UserError(f"{shown}.{key}: {table[key]} given, but {path.name} has {value}")
    return table


def molecule_from_file(
    path: str, *, charge: int = 0, multiplicity: int = 1, basis: str = "sto-3g"
) -> MoleculeSpec:
    """The molecule of one .xyz or FCIDUMP file given on the command line; raises UserError."""
    from replicate.spec.problems import explain

    name = Path(path).stem
    if path.lower().endswith(".xyz"):
        table: dict[str, Any] = {"xyz": path, "charge": charge, "multiplicity": multiplicity, "basis": basis}
    else:
        table = {"fcidump": path, "basis": "as in the file"}
    table = fill_from_file(table, Path(), name)
    return explain(MoleculeSpec, {"name": name, **table}, lambda key: f"{path}: {key}" if key else path)
