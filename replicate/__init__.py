"""A replication of "Large Language Model Scaling Laws for Neural Quantum States in Quantum Chemistry".

One road from a spec to a figure: spec -> points -> molecule and Hamiltonian -> ansatz -> samples -> local
energy -> training -> point file -> cube -> fit -> figures. `python -m replicate --help` lists the commands.
"""

from __future__ import annotations

__version__ = "0.1.0"
