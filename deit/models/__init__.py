"""Students, and the small networks that can teach them."""
