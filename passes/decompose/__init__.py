"""Decompositions: pure mathematics from a layer's weight to the factors of a chain."""
