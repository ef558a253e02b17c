"""Stages that train: students, the loop, and its optimizer, checkpoints and log."""
