"""Figures, tables, verdicts and the report, from a cube and a fit alone (`python -m figures CUBE`)."""
