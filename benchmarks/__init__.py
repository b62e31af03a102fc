"""Benchmarks: one file an op and one for each end-to-end claim. README.md says how to run them."""
