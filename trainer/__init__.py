"""Trains a model from text: data, curriculum, optimizer, checkpoints, export. Imports shared only."""
