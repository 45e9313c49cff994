"""The embedded demo network and its data."""
