"""`fit` and its like: batches that enter, metrics and logs, checks, files, where it goes on."""
