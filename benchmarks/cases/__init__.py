"""What is measured: inputs, providers and what they must agree on, a file per room of the ops."""
