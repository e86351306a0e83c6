"""The `palcache` command: parse, one library call, print."""
