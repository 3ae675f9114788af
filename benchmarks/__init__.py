"""Measurements of `tutorial_moco`, each run as ``python -m benchmarks.NAME``; the last line it prints is the verdict."""
