"""What a run leaves behind to go on from or to sample: one format, one writer, one reader."""
