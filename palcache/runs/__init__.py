"""Run folders: trained, evaluated, read back, and users added to them."""
