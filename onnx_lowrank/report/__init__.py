"""The report: dataclasses, JSON and terminal table."""
