"""All that knows about processes: sharding plans, checkpoints."""
