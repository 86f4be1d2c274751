"""Imports every module that registers a figure or a table; the order of imports is the order
within a section."""

from __future__ import annotations

from figures import compute, costs, diagnostics, effects, pilot, scaling, tables, training, verdicts

__all__ = ["compute", "costs", "diagnostics", "effects", "pilot", "scaling", "tables", "training", "verdicts"]
