"""Many heads on one table: grids, plans, stacks trained together, folders of runs."""
