"""Experiments through the public API: run them as modules, ``python -m experiments.…``."""
