"""Speed and counts of the step and its parts, for asv (`make bench`) and for the gate (`make bench-gate`)."""
