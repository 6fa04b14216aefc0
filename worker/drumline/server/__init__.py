"""The HTTP server in front of a runner: routes, problems, health, metrics, graceful stop. The only user of FastAPI."""
