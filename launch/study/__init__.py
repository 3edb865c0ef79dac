"""Studies: grids of runs, their launching and their report."""
