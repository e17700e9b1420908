"""Devices, processes, and how arrays lie on them."""
