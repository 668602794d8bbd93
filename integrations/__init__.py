"""Where gradcomp meets training code: the optimizer hook, and worker processes that train a task."""
