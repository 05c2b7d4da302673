"""Published architectures at a small size, as plain modules: the operators and couplings of each, few channels."""
