"""Backends, one module each; flashlla.dispatch chooses among them."""
