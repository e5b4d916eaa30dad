"""The backend on a GPU: slices, graphs, streams, meters."""
