"""The model package: the network, its tokenizer, its files. Imports nothing of ours, no web framework and no Redis."""
