"""Train a small byte-level MoE language model and record how it routes; `train` is the entry.

It is not a serving engine, and no text and no token id leaves it: only expert ids with a domain label do.
"""
