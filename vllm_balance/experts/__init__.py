"""Experts of one rank: host store, dynamic slots, copies into them, and what the CPU computes."""
