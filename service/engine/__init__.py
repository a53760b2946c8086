"""Tensors only: continuous batching over key-value slots. Knows no HTTP and no Redis."""
