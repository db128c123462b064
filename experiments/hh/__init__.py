"""Human preference pairs over assistant replies, in four groups."""
