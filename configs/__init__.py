"""Experiments, one file each; `default.py` holds every field with its meaning."""
