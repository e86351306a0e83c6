"""The published implementation: its checkpoint layout, and rewards from token ids."""
