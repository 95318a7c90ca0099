"""`glann doctor`: what is missing, and what is exposed."""
