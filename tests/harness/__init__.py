"""What every test of an op shares: the numerics rule (accuracy.py) and how each backend runs here (machines.py)."""
