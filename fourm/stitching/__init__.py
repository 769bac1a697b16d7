"""Stitching: frozen encoders, their stored latents, and the connectors that join them."""
