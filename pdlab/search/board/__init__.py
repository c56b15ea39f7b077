"""The board: every row of a table of measured servers, simulated as it was measured, and how far off the simulator is."""
