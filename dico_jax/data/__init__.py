"""Examples and the way they take to the network: sources, pictures, prepared latents, batches."""
