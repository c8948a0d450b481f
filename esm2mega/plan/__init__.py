"""Says what a training needs before it starts: memory of every rank, communication, time; ranks layouts."""
