"""The molecule table: one TOML table per molecule, addressed by its name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from replicate.spec.files import fill_from_file, read_text
from replicate.spec.models import MoleculeSpec, UserError
from replicate.spec.problems import explain, show, suggest

_PACKAGE = Path(__file__).parents[1]


def shared_table(folder: Path) -> Path:
    """The molecule table that is meant where none is named: the folder's own, else the one of this package.

    The latter is specs/molecules.toml of a checkout, or its copy in an installed package.
    """
    places = (folder, _PACKAGE / "specs", _PACKAGE.parent / "specs")
    tables = [place / "molecules.toml" for place in places]
    return next((table for table in tables if table.is_file()), tables[0])


# Known of a molecule as it stands in the table, not of one with another charge, spin or basis.
_KNOWN = ("reference", "unique_flips")


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """The molecules of a table; raises UserError."""
    try:
        raw = tomllib.loads(read_text(path, str(path)))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return {name: table for name, table in raw.items() if isinstance(table, dict)}


def build_molecule(name: str, table: Mapping[str, Any], folder: Path, where: str) -> MoleculeSpec:
    """One molecule, its files read relative to `folder`; raises UserError with lines `where.key: ...`."""
    filled = fill_from_file(dict(table), folder, where)
    return explain(MoleculeSpec, {**filled, "name": name}, lambda key: f"{where}.{key}".rstrip("."))


def molecule_by_name(name: str, path: Path, changes: Mapping[str, Any]) -> MoleculeSpec:
    """One molecule of a table, with some of its keys changed; raises UserError."""
    tables = read_table(path)
    if name not in tables:
        raise UserError(f"{path}: unknown molecule {show(name)}{suggest(name, tables)}")
    entry = {**tables[name], **changes}
    if any(tables[name].get(key) != value for key, value in changes.items()):
        for key in (*_KNOWN, *(["spin_orbitals"] if "basis" in changes else [])):
            entry.pop(key, None)
    return build_molecule(name, entry, path.parent, f"{path}: {name}")
