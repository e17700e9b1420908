"""The few operations worth a gradient of their own, each beside its plain form."""
