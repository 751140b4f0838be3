"""Serving: an engine that answers many requests on one model, and the HTTP server in front of it."""
