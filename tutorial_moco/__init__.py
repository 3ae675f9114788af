"""Momentum Contrast (arXiv 1911.05722), built to be read, learned from and trained with."""

__version__ = "0.1.0"
