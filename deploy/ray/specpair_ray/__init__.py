"""Both services under Ray Serve, which places, restarts and scales them; clients connect to them directly."""
