"""Stage 1: comparisons x encoder -> cache, by one process or many."""
