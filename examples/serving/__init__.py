"""Two adapters for one base, to be served together."""
