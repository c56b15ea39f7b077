"""Many simulations that together answer a question."""
