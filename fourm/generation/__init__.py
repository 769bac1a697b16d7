"""From what is known to what is asked: plans, sampling, the sampler, and pictures of what it returns."""
