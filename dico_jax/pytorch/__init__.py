"""Weights from PyTorch code and back."""
