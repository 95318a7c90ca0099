"""Engines: one optimiser step of a network, through DeepSpeed or plain PyTorch."""
