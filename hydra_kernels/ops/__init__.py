"""The public functions: checks, choice of backend, differentiation."""
