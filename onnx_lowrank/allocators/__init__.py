"""Rank rules: from a candidate table and a budget to one choice per layer."""
