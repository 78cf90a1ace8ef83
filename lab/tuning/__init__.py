"""Equal tuning: search spaces, trials, the AlgoPerf score."""
