"""`glann doctor`: preflight and security checks."""
