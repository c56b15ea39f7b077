"""This machine: its processes, cores, memory, logs."""
