"""Real time: the engine, its sinks and takes, and the player in the notebook."""
