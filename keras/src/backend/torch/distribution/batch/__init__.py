"""What needs all rows of a batch: gathers, statistics, whether all read the
same data."""
