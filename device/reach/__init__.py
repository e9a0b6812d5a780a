"""Thinking harder: what the loop asks a background model, over the network, without ever waiting for it."""
