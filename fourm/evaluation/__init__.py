"""Evaluation: what a tokenizer loses, what every modality tells about every other, and the page that shows it."""
