"""What jaxclust is measured against; `make bench` runs every script and writes RESULTS.md."""
