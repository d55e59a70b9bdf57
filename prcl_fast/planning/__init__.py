"""Planning: memory, time and profile of a run before it starts."""
