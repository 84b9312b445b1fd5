"""Moving bulk data: plan, workers, source, sink."""
