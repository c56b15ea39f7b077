"""Above both worlds: measuring real engines, and holding simulations against them."""
