"""One shard, one table, one claim: what lies in a cache folder, byte for byte."""
