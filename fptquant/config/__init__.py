"""What a run is: a frozen schema, labels of settings, and loading from YAML with ``key=value`` overrides."""
