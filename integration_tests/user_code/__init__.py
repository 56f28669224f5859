"""Programs of user code, a fault or a habit each, in tables by kind."""
