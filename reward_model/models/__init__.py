"""The model: how it reads text, its contract, loading, adapters, ensembles, and other makers' models."""
