"""The few operations worth tuning, each with one signature and several implementations."""
