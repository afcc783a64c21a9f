"""The ground that all else stands on: numerics, hyper-parameters, means over data."""
