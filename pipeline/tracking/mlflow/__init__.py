"""MLflow: what a run directory holds goes into a store. The only room that imports mlflow."""
