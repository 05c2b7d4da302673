"""The benchmark suite: what is claimed, anyone can measure again."""
