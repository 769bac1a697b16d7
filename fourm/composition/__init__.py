"""Composition: models that were trained apart from one base become one model, without training."""
