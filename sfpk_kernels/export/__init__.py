"""A pruned model in a file, and back."""
