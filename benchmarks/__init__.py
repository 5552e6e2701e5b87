"""Measurements. Each prints a table and ends with one JSON line."""
