"""The verbs of the command line, one module each; the only room that joins all others."""
