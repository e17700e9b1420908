"""Images from noise: of a network, and of a checkpoint into a folder."""
