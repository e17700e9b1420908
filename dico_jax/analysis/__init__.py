"""What a trained network does inside: its channels, its attention, and what its parts cost.

docs/analysis.md has the formula of every measure.
"""
