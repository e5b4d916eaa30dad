"""expertslice: a testbed for expert-sliced GPU scheduling of Mixture-of-Experts layers."""

__version__ = "0.1.0"
