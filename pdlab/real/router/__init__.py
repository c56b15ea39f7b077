"""The live world: a router's process, and how it reaches instances."""
