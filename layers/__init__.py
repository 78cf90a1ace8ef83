"""What a model is built from: attention, residual paths, kernels."""
