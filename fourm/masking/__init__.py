"""From token samples to masked batches: which tokens are given to the model, and which are asked of it."""
