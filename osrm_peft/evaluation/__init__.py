"""Scores, interference and spectra; their tables, plots and page."""
