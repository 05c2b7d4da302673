"""Implementations of others to be compared with."""
