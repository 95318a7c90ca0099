"""MLflow runs, the packaged model, the model card and the report."""
