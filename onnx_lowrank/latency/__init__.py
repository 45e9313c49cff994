"""Measured latency of chains and models."""
