"""What was routed: schema, store, importers, composition, synthesis, statistics. Never imports torch or simpy."""
