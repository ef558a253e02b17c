"""Grids, granularities, range setting, the quantizer module and where quantizers sit."""
