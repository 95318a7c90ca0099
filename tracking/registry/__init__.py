"""Models in MLflow's registry: versions, champions, lineage."""
