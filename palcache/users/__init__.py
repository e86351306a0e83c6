"""New users on a frozen head: comparisons in terms of size k, posteriors, priors, curves."""
