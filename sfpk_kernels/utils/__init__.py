"""Files, arguments, tensors, memory: of no room in particular."""
