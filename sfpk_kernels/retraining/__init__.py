"""Training with removed weights at zero, at once or shot by shot."""
