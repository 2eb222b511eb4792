"""Items, events and histories: schema, readers, batches, synthetic logs."""
