"""The search over channels, heads and neurons: coordinates, polarizer, energy and result of such a run."""
