"""Latency, measured: the table that remembers, the clock, chains priced one by one, and the machine's channel block."""
