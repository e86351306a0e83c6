"""A cache over the years: verified, repaired, compacted, merged, exported, filled from elsewhere."""
