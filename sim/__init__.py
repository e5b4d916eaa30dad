"""The backend on SimPy: slices, streams, memory, host, clock and power as discrete events."""
