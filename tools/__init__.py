"""Converters, run from a checkout."""
