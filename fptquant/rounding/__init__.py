"""The rounding of weights, block by block, for the inputs that they will meet."""
