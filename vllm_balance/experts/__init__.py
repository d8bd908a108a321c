"""How a rank computes its experts."""
