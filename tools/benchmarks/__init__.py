"""What tools/benchmark.py measures: an update, the stages of the data stream, a Pillow loader to compare with."""
