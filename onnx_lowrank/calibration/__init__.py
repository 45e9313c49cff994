"""What a few hundred samples say about a network: activations layer by layer, and moments of them."""
