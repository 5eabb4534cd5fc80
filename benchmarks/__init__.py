"""pyllm's benchmarks: `pytest benchmarks --benchmark-only`."""
