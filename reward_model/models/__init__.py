"""Reward models: the contract, tokenization, loading, adapters, ensembles, and other makers' models."""
