"""Reading a run afterwards: its metrics, and figures of them."""
