"""Specs: TOML -> Study -> points with content ids. pydantic lives only here; nothing heavy is imported."""

from __future__ import annotations

from replicate.spec.files import molecule_from_file
from replicate.spec.load import AXES, Study, load_study
from replicate.spec.models import (
    ANSATZ_ENTRY_POINTS,
    MAX_SPIN_ORBITALS,
    SCHEMA,
    AnsatzSpec,
    CheckpointSpec,
    EvaluationSpec,
    HoldoutSpec,
    MoleculeSpec,
    PhaseSpec,
    Point,
    ReferenceSpec,
    SamplingSpec,
    Selector,
    TrainSpec,
    UserError,
    VScoreSpec,
)
from replicate.spec.table import molecule_by_name, shared_table

__all__ = [
    "ANSATZ_ENTRY_POINTS",
    "AXES",
    "MAX_SPIN_ORBITALS",
    "SCHEMA",
    "AnsatzSpec",
    "CheckpointSpec",
    "EvaluationSpec",
    "HoldoutSpec",
    "MoleculeSpec",
    "PhaseSpec",
    "Point",
    "ReferenceSpec",
    "SamplingSpec",
    "Selector",
    "Study",
    "TrainSpec",
    "UserError",
    "VScoreSpec",
    "load_study",
    "molecule_by_name",
    "molecule_from_file",
    "shared_table",
]
