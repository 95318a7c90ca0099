"""Models in MLflow's registry: versions, champions, where they come from."""
