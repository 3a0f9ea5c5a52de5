"""Adapters on the Hub: model card, training metadata, push and pull."""
