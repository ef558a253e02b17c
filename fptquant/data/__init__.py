"""Calibration and evaluation text, and windows of tokens cut from it."""
