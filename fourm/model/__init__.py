"""Masked any-to-any encoder-decoder (4M, Mizrahi et al. 2023)."""
