"""Weights as one flat vector: which are prunable, where each stands, what is refused."""
