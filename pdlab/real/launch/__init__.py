"""From a command line to processes that serve."""
