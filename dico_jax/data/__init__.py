"""Examples and the way they take to the network: sources, pictures, prepared latents, batches.

Nothing here knows what a network is told of an example but `read_condition`, the network's own.
"""
