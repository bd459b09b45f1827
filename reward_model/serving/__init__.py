"""A reward model over HTTP: server and client."""
