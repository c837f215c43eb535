"""Simulation of kernels on tensors without memory: memory in use, work done."""
