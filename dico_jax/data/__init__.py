"""Examples and the way they take to the network: sources, pictures, prepared latents, batches.

What reads examples from a disk or bucket, decides their order, or keeps what is made of them once
belongs here. Nothing here knows what a network is told of an example but `read_condition`, which is
the network's own.
"""
