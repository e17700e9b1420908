"""The few operations worth tuning: more than one implementation, or a gradient of their own."""
