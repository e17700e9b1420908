"""The few operations worth a gradient of their own, each beside its plain form.

`plain` says how the two stand together, `cpu` has all that is there for XLA on CPU alone.
"""
