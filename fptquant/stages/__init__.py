"""Stages: each a function of a model, in the order of the pipeline."""
