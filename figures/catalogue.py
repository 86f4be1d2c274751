"""Imports every module that registers a figure or a table; the order of imports is the order within a section."""

from __future__ import annotations

from figures import scaling, tables, training

__all__ = ["scaling", "tables", "training"]
