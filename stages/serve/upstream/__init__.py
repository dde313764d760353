"""Somebody else's model behind our guard: the engine, the line of requests, and what leaves and comes back."""
