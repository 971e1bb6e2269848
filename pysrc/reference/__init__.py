"""Plain PyTorch: what every kernel is measured against, in any dtype, on any device, holding the big matrix."""
