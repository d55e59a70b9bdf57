"""Several processes of one run: launch, rendezvous, collectives, heartbeat, watchdog."""
