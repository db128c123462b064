"""Figures of one or several runs, from their metrics files."""
