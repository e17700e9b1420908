"""The page that tries checkpoints."""
