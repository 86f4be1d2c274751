"""Engines: two strings in (spec, point id), a point file out. `local` is the one that is always there."""

from __future__ import annotations
