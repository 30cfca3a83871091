"""Maths: tensors in, tensors out; no config, clock, device or file."""
