"""One loop that trains everything: `trainer` knows the run, `tasks` the loss, `optim` the update."""
