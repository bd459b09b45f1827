"""Serve a reward model over HTTP, and ask such a server."""
