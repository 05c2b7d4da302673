"""The search for a mask: particles, energies, votes, the loop over the steps, and a run's state."""
