"""Fine-tuning on labelled proteins: the run, its losses and metrics, and prediction with the result."""
