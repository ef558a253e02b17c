"""Progress, tables, plots and run folders: what a user sees of a run."""
