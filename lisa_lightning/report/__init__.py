"""Reports of runs and sweeps: pages with plots, sweep.csv and terminal tables. Start at `run_page` and `sweep_page`."""
