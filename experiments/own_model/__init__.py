"""Train a small byte-level MoE language model and record how it routes.

`model` is the network in plain PyTorch, `data` reads the corpus and keeps held-out text apart,
`train` is the entry (`python -m expertslice.experiments.own_model.train`), `record` serves held-out
prompts with a key-value cache and writes the routing. It is not a serving engine, and no text and no
token id ever leaves it: only expert ids with a domain label do.
"""
